"""Indexes of tar shards, kept from one run to the next: a pass over ten million headers takes minutes.

They lie in ``layton/indexes`` of the user's cache folder (``$XDG_CACHE_HOME``, else ``~/.cache``; ``$LAYTON_CACHE``
instead of both). One counts for a shard of the same path, size and time of modification, and is made anew otherwise;
where nothing can be written nothing is kept. Deleting the folder is always safe.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from layton.data.tar import Captions, ShardIndex, index_shard
from layton.data.texts import PackedTexts
from layton.folder import write_atomically

_FORMAT = "1"
_KEPT_FROM = 64  # samples: a smaller shard is read as quickly as its index
_SAY_EVERY_SECONDS = 10.0


def index_shards(paths: Sequence[Path], *, captions: Captions = "required") -> list[ShardIndex]:
    """Indexes of shards, those that are kept and those that are made now; says on stderr how far it is.

    Args:
        paths: Local, uncompressed tar files.
        captions: Whether a sample without .txt and .json is an error.

    Raises:
        ShardError: See `layton.data.tar.index_shard`.
    """
    found, said = [], time.monotonic()
    for path in paths:
        found.append(_kept_index(path, captions) or _new_index(path, captions))
        if time.monotonic() - said > _SAY_EVERY_SECONDS:
            said = time.monotonic()
            sys.stderr.write(f"layton: {len(found):,} of {len(paths):,} shards are indexed\n")
    return found


def cache_folder() -> Path:
    """Where indexes are kept; it need not exist."""
    chosen = os.environ.get("LAYTON_CACHE")
    root = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "layton"
    return root / "indexes"


def _new_index(path: Path, captions: Captions) -> ShardIndex:
    index = index_shard(path, captions=captions)
    if len(index.keys) >= _KEPT_FROM:
        with contextlib.suppress(OSError, SafetensorError):  # a full or read-only home is no reason to stop
            _keep(index, _place_of(path))
    return index


def _place_of(path: Path) -> Path:
    return cache_folder() / f"{hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:32]}.safetensors"


def _keep(index: ShardIndex, place: Path) -> None:
    content, ends = index.keys.arrays
    metadata = {
        "format": _FORMAT,
        "stamp": json.dumps(index.stamp),
        "missing": json.dumps(index.missing),
        "ignored": json.dumps(index.ignored),
    }
    tensors = {"keys": content, "key_ends": ends, "spans": index.spans}
    write_atomically(place, lambda part: save_file(tensors, part, metadata))


def _kept_index(path: Path, captions: Captions) -> ShardIndex | None:
    """What is kept of a shard, if that is still the same; None for anything that is not as it was written."""
    try:
        status = path.stat()
        with safe_open(_place_of(path), framework="numpy") as file:
            known = file.metadata() or {}
            stamp = (status.st_size, status.st_mtime_ns)
            if known.get("format") != _FORMAT or json.loads(known["stamp"]) != list(stamp):
                return None
            keys = PackedTexts.of_arrays(file.get_tensor("keys"), file.get_tensor("key_ends"))
            spans = file.get_tensor("spans")
        if spans.shape != (len(keys), 3, 2) or spans.dtype != np.int64:
            return None
        missing, ignored = list(json.loads(known["missing"])), Counter[str](json.loads(known["ignored"]))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None
    if captions == "required" and bool((spans[:, 1:, 0] < 0).all(axis=1).any()):
        return None  # indexed when captions were optional: the pass over the shard says which is missing
    return ShardIndex(path, stamp, keys, spans, missing, ignored)
