"""``layton data``: is a dataset readable, is a token dataset whole, what do its tokens show, and as a table."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from generation.data.inputs import SCENES, ImageOptions, SplitOrAll
from layton.data.geometry import FIT_POLICIES
from layton.progress import progress

if TYPE_CHECKING:
    from torch import Tensor

    from generation.data.token_shards import TokenShard
    from layton.tokenizer import EncodedImages, LaytonTokenizer


def verify(folder: Path) -> int:
    """Check every byte, count and code of a token dataset; every fault is named, exit status 1 if there is one.

    Args:
        folder: what `layton tokenize` wrote.
    """
    from generation.data import token_shards

    faults = token_shards.verify(folder)
    for fault in faults:
        sys.stderr.write(f"layton: {fault}\n")
    if faults:
        return 1
    counts = token_shards.read_json(folder / token_shards.MANIFEST_NAME)["counts"]
    sys.stdout.write(f"{folder}: whole; {counts['samples']} samples, {counts['skipped']} passed over\n")
    return 0


def check(sources: list[str], *, split: SplitOrAll = "all", repeated_keys: bool = False) -> int:
    """Decode every image of a dataset; every broken one is named, exit status 1 if there is one.

    Args:
        sources: tar shards (files or patterns), or one folder of shards or of images.
        split: train, validation, test, or all.
        repeated_keys: accept shards that use the same keys.
    """
    from layton.data.images import ImageError
    from layton.data.sources import StoredSource
    from layton.errors import UsageError

    if list(sources) == [SCENES]:
        raise UsageError("scenes are rendered, there is nothing to check: name shards or a folder of images")
    source, name = ImageOptions(split=split, repeated_keys=repeated_keys).open(sources, size=256)
    if not isinstance(source, StoredSource):
        raise UsageError(f"{name} holds no stored images")
    faults, found = list(source.bad.reasons), Counter[str]()
    with progress(len(source), "check") as bar:
        for index in range(len(source)):
            try:
                stored = source.load(index)
                found["with a caption" if stored.caption else "without a caption"] += 1
            except ImageError as error:
                faults.append(str(error))
            bar.update(1)
    for fault in faults:
        sys.stderr.write(f"layton: {fault}\n")
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(found.items()))
    sys.stdout.write(f"{name}: {kinds or 'no readable image'}, {len(faults)} broken or missing\n")
    return int(bool(faults))


def decode(
    tokens: Path,
    *,
    out: Path,
    count: int = 16,
    tokenizer: str = "mini",
    decoder: str | None = None,
    steps: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
    device: str | None = None,
    allow: list[str] | None = None,
) -> None:
    """Decode samples of a token dataset, evenly spread over it, to PNG files with their captions beside them.

    Pictures have the sizes of the images that were tokenized, where the shards know these.

    Args:
        tokens: what `layton tokenize` wrote, or one shard of it.
        out: new or empty folder to write: an image folder with captions, such as `layton tokenize` reads.
        count: how many samples; all if there are fewer.
        tokenizer: the tokenizer that made the codes: embedded tokenizer or folder.
        decoder: name of the code decoder; the tokenizer's own choice by default.
        steps: network evaluations of the decoder; its own number by default.
        seed: of the noise that decoders begin with, the same for every image.
        batch_size: images decoded at once.
        device: where to run; the accelerator if there is one.
        allow: dotted names, or their beginnings, of classes of your own that a saved part may name.
    """
    from layton.errors import UsageError
    from layton.loading import load_with_decoder, same_noise
    from layton.options import require_least
    from layton.staging import SafeNames, staged

    require_least(1, {"count": count, "batch_size": batch_size, "steps": steps})
    require_least(0, {"seed": seed})
    if out.is_dir() and any(out.iterdir()):
        raise UsageError(f"{out} is not empty: what is there would be taken for samples")
    chosen = _spread(tokens, count)
    model, decoder = load_with_decoder(tokenizer, decoder, num_steps=steps, device=device, allow=allow)
    names, total = SafeNames(), sum(map(len, chosen.values()))
    with staged(out) as folder, progress(total, "decode") as bar:
        for path, rows in chosen.items():
            shard, encoded = _read(path, model)
            for start in range(0, len(rows), batch_size):
                part = rows[start : start + batch_size]
                pictures = model.decode_images(
                    encoded(part), decoder=decoder, num_steps=steps, generator=same_noise(seed, len(part))
                )
                for row, picture in zip(part, pictures, strict=True):
                    place = folder / names.unique(f"{shard.keys[row]}.png", suffix=".png")
                    picture.save(place)
                    place.with_suffix(".txt").write_text(f"{shard.captions[row]}\n", encoding="utf-8")
                bar.update(len(part))
    sys.stdout.write(f"{out}: {total} images\n")


def export(tokens: Path, *, out: Path, overwrite: bool = False) -> None:
    """Write a token dataset as Parquet files: key, caption, codes, and height and width of the images.

    Any table reader takes them, such as Hugging Face's datasets. Cached text features stay behind.

    Args:
        tokens: what `layton tokenize` wrote.
        out: folder to write; made if needed.
        overwrite: replace files that are there already.
    """
    from generation.data.parquet import write_parquet
    from generation.data.token_shards import shard_files, shard_sizes
    from layton.staging import require_free, staged

    if not overwrite:
        require_free(out, [f"{path.stem}.parquet" for path in shard_files(tokens)])
    with staged(out, overwrite=overwrite) as folder, progress(sum(shard_sizes(tokens).values()), "export") as bar:
        total = write_parquet(tokens, folder, on_progress=bar.update)
    sys.stdout.write(f"{out}: {total} samples\n")


def _spread(tokens: Path, count: int) -> dict[Path, list[int]]:
    """Rows of the shards that ``count`` samples, evenly spread over all of them, stand in."""
    from generation.data.token_shards import read_shard, shard_sizes

    sizes = shard_sizes(tokens) if tokens.is_dir() else {tokens: len(read_shard(tokens, with_text=False)[1])}
    total = sum(sizes.values())
    wanted = iter(sorted({index * total // min(count, total) for index in range(min(count, total))}))
    chosen: dict[Path, list[int]] = {}
    first, place = 0, next(wanted, total)
    for path, size in sizes.items():
        while place < first + size:
            chosen.setdefault(path, []).append(place - first)
            place = next(wanted, total)
        first += size
    return chosen


def _read(path: Path, model: LaytonTokenizer) -> tuple[TokenShard, Callable[[list[int]], EncodedImages | Tensor]]:
    """A shard of the tokenizer's codes, and rows of it as `LaytonTokenizer.decode_images` takes them.

    Raises:
        ValueError: With both fingerprints, if the codes are another tokenizer's.
    """
    from generation.data.token_shards import read_shard
    from layton.tokenizer import EncodedImages

    header, shard = read_shard(path, with_text=False)
    if header.fingerprint != model.fingerprint():
        raise ValueError(
            f"{path} was made by another tokenizer: its codes have fingerprint {header.fingerprint}, "
            f"this tokenizer's is {model.fingerprint()}"
        )
    if shard.sizes is None or header.policy not in FIT_POLICIES:
        return shard, lambda rows: shard.codes.long()[rows]
    whole = shard.encoded(header)
    return shard, lambda rows: EncodedImages(whole.codes[rows], tuple(whole.geometries[row] for row in rows))
