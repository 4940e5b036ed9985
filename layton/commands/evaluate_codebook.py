"""``layton evaluate codebook``: how much of a codebook images use; only the encoder runs."""

from __future__ import annotations

import sys
from pathlib import Path

from layton.data.types import Share
from layton.errors import UsageError
from layton.folder import write_json
from layton.options import require_least
from layton.progress import progress


def evaluate_codebook(
    *,
    data: list[str],
    split: Share = "test",
    count: int | None = None,
    size: int | None = None,
    image_column: str | None = None,
    tokenizer: str = "mini",
    batch_size: int = 16,
    device: str | None = None,
    allow: list[str] | None = None,
    json: Path | None = None,
) -> None:
    """Count the codes of all images together: usage, perplexity and dead codes. Nothing is decoded.

    Args:
        data: the word scenes, and beside or instead of it a folder of images or tar shards (files or patterns).
        split: train, validation or test; all takes every stored image.
        count: how many images, the first ones; of scenes alone where these are named beside others. Of scenes 1,000 by
            default.
        size: side in pixels to which images are cropped and scaled; the tokenizer's own by default.
        image_column: of a table; "image" by default.
        tokenizer: embedded tokenizer or folder.
        batch_size: images at once.
        device: where to run; the accelerator if there is one.
        allow: dotted names, or their beginnings, of classes of your own that a saved part may name.
        json: write figures and protocol to this file as well.
    """
    from layton.data.evaluation import SCENES, open_images
    from layton.loading import load_tokenizer
    from layton.metrics.codebook import CodebookStatistics
    from layton.metrics.protocol import library_versions

    require_least(1, {"batch_size": batch_size, "count": count, "size": size})
    model = load_tokenizer(tokenizer, decoders=[], device=device, allow=allow)
    stored = [item for item in data if item != SCENES]
    if image_column is not None and not stored:
        raise UsageError("only tables have columns, and scenes are none")
    groups: list[tuple[list[str], int | None, str | None]] = [([SCENES], count, None)] if SCENES in data else []
    groups += [(stored, None if groups else count, image_column)] if stored else []
    opened = [
        open_images(
            names,
            split=split,
            count=count,
            size=size or model.image_size,
            batch_size=batch_size,
            image_column=column,
        )
        for names, count, column in groups
    ]
    statistics = CodebookStatistics(model.vocab_size)
    with progress(sum(len(images.numbers) for images in opened), "encode") as bar:
        for images in opened:
            for batch in images:
                statistics.update(model.encode(batch).cpu())
                bar.update(len(batch))
    report = statistics.report()
    sys.stdout.write(
        f"codebook: {report.used_codes} of {report.vocab_size} codes used ({report.usage:.1%}), "
        f"perplexity {report.perplexity:.0f}, over {sum(images.count for images in opened)} images\n"
    )
    for images in opened:
        images.tell_share()
    if json is not None:
        protocol = {
            "tokenizer": f"{tokenizer}, codebook {model.fingerprint()}",
            "split": split,
            "data": {images.name: images.count for images in opened},
            "preprocessing": {images.name: images.preprocessing for images in opened},
            "versions": library_versions(),
        }
        write_json(json, {**report.to_dict(), "protocol": protocol})
