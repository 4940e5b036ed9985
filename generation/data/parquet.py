"""Token shards as Parquet files, for trainers that read tables: one file for each shard.

Columns: ``key`` and ``caption`` (strings), ``codes`` (N unsigned integers each), and ``height`` and ``width`` of the
images before they became square, where that is known. The schema's metadata says under ``layton`` which tokenizer made
the codes. Cached text features stay behind.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from generation.data.token_shards import TokenHeader, TokenShard, read_shard, shard_files
from layton.folder import write_atomically


def write_parquet(tokens: Path, out: Path, *, on_progress: Callable[[int], object] | None = None) -> int:
    """Write ``tokens-00000.parquet`` and so on.

    Args:
        tokens: A finished token dataset.
        out: An existing folder.
        on_progress: Told of each shard how many samples it had.

    Returns:
        Number of samples.

    Raises:
        ImportError: pyarrow is not installed.
        ValueError: No finished dataset, or a damaged shard.
    """
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ImportError("Parquet files need pyarrow: pip install 'layton[datasets]'") from error
    total = 0
    for path in shard_files(tokens):
        header, shard = read_shard(path, with_text=False)
        write_atomically(out / f"{path.stem}.parquet", partial(parquet.write_table, _table(header, shard)))
        total += len(shard)
        if on_progress is not None:
            on_progress(len(shard))
    return total


def _table(header: TokenHeader, shard: TokenShard) -> Any:
    import pyarrow as arrow

    values = arrow.array(shard.codes.flatten().numpy())
    columns = {
        "key": arrow.array(list(shard.keys), arrow.string()),
        "caption": arrow.array(list(shard.captions), arrow.string()),
        "codes": arrow.FixedSizeListArray.from_arrays(values, header.num_tokens),
    }
    if shard.sizes is not None:
        columns |= {name: arrow.array(shard.sizes[:, place].numpy()) for place, name in enumerate(("height", "width"))}
    return arrow.table(columns, metadata={"layton": json.dumps(asdict(header), sort_keys=True)})
