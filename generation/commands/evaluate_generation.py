"""``layton evaluate generation``: generated images against the real ones of a captioned data set."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from generation.drawers import DrawerOptions, load_drawer
from generation.sampling.choice import SamplingChoice
from layton.data.types import Share
from layton.errors import UsageError
from layton.folder import write_json
from layton.options import require_least
from layton.progress import progress
from layton.ranks import num_ranks

if TYPE_CHECKING:
    from torch import Tensor

    from layton.data.evaluation import EvaluationImages

_DRAWER, _SAMPLING = DrawerOptions(), SamplingChoice()


def evaluate_generation(
    *,
    drawer: DrawerOptions = _DRAWER,
    sampling: SamplingChoice = _SAMPLING,
    data: list[str],
    split: Share = "test",
    count: int | None = None,
    size: int = 256,
    image_column: str | None = None,
    caption_column: str | None = None,
    clip: str | None = None,
    resamples: int = 20,
    seed: int = 0,
    batch_size: int = 8,
    json: Path | None = None,
) -> None:
    """Draw an image for each caption of a data set: FD-effnet against its images; FID and CLIP score where possible.

    Weights that are not on disk are not downloaded; what is not measured is listed with the reason.

    Args:
        drawer: which model draws.
        sampling: how.
        data: the word scenes, a folder of images with captions, or tar shards (files or patterns).
        split: train, validation or test; all takes every stored image.
        count: images to take from the start of the split; 1,000 scenes or all stored images by default.
        size: side in pixels to which real images are cropped and scaled; that of drawn ones.
        image_column: of a table; "image" by default.
        caption_column: of a table; by default caption, text, prompt or label, the first that there is.
        clip: folder of a CLIP model in transformers' format.
        resamples: bootstrap resamples for the spread of FD-effnet; 0 for none.
        seed: of the first image; the following images count up from it.
        batch_size: images at once.
        json: write figures and protocol to this file as well.
    """
    from generation.evaluation.generation import evaluate_generation as evaluate
    from layton.data.evaluation import open_images
    from layton.metrics.external import ExternalSources

    require_least(1, {"count": count, "size": size, "batch_size": batch_size})
    require_least(0, {"seed": seed, "resamples": resamples})
    if resamples == 1:
        raise UsageError("--resamples must be 0 or at least 2: one draw has no spread")
    images = open_images(
        data,
        split=split,
        count=count,
        size=size,
        batch_size=batch_size * num_ranks(),
        image_column=image_column,
        caption_column=caption_column,
    )
    if images.count < max(2, num_ranks()):
        raise UsageError(f"two sets are compared: at least two images are needed, got {images.count}")
    require_captions(images)  # before hours of drawing
    loaded = load_drawer(drawer, sampling)
    facts = {"dataset": images.name, "split": split, "preprocessing": images.preprocessing, "size": size}
    with progress(images.count, "draw") as bar:
        report = evaluate(
            loaded.draw,
            captioned(images),
            protocol={**facts, **loaded.settings},
            seed=seed,
            device=drawer.device,
            sources=ExternalSources(clip=clip),
            num_resamples=resamples,
            on_progress=bar.update,
        )
    sys.stdout.write(report.summary() + "\n")
    images.tell_share()
    if json is not None:
        write_json(json, report.to_dict())


def require_captions(images: EvaluationImages) -> None:
    """Refuse stored images of which one has no caption.

    Raises:
        ValueError: With the first one.
    """
    from layton.data.sources import StoredSource

    source = images.source
    if isinstance(source, StoredSource):
        bare = next((index for index in range(images.count) if not source.told(index)), None)
        if bare is not None:
            raise ValueError(f"{source.keys[bare]} has no caption to draw from")


def captioned(images: EvaluationImages) -> Iterator[tuple[Tensor, list[str]]]:
    """Batches of images (B, 3, S, S) in [-1, 1] and their captions.

    Raises:
        ValueError: If an image has no caption.
    """
    import torch

    for start in range(0, images.count, images.batch_size):
        stop = min(start + images.batch_size, images.count)
        samples = [images.source.sample(index, seed=0) for index in range(start, stop)]
        untold = [sample["key"] for sample in samples if not sample["caption"]]
        if untold:
            raise ValueError(f"{untold[0]} has no caption to draw from")
        yield torch.stack([sample["image"] for sample in samples]), [sample["caption"] for sample in samples]
