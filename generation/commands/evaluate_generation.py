"""``layton evaluate generation``: generated images against the real ones of a captioned data set."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from generation.choice import SamplingChoice
from generation.commands.models import Kind, load_drawer
from generation.commands.options import Weights, require_least
from layton.commands.calling import progress
from layton.commands.reports import write_json
from layton.data.types import Share
from layton.errors import UsageError
from layton.ranks import num_ranks

if TYPE_CHECKING:
    from torch import Tensor

    from layton.commands.evaluation_data import EvaluationImages


def evaluate_generation(
    *,
    data: list[str],
    model: str = "mini",
    kind: Kind = "laytongen",
    student: str | None = None,
    planner: str | None = None,
    split: Share = "test",
    count: int | None = None,
    size: int = 256,
    tokenizer: str | None = None,
    decoder: str | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_entropy: float | None = None,
    candidates: int | None = None,
    no_layout: bool = False,
    weights: Weights | None = None,
    clip: str | None = None,
    resamples: int = 20,
    seed: int = 0,
    batch_size: int = 8,
    device: str | None = None,
    allow: list[str] | None = None,
    json: Path | None = None,
) -> None:
    """Draw an image for each caption of a data set: FD-effnet against its images; FID and CLIP score where possible.

    Weights that are not on disk are not downloaded; what is not measured is listed with the reason.

    Args:
        data: the word scenes, a folder of images with captions, or tar shards (files or patterns).
        model: embedded model or folder.
        kind: laytongen, or diffusion for a diffusers text-to-image folder.
        student: export of `layton distill` on a diffusers pipeline, or mini; it draws as it was trained to.
        planner: embedded model or folder of a LaytonGen, whose planner says prompts anew with places, for a diffusion
            model that learnt such prompts.
        split: train, validation or test; all takes every stored image.
        count: images to take from the start of the split; 1,000 scenes or all stored images by default.
        size: side in pixels to which real images are cropped and scaled.
        tokenizer: of LaytonGen, where it does not lie beside the generator.
        decoder: name of the code decoder; the tokenizer's own choice by default.
        steps: of the decoder, or of the diffusion model; its own number by default.
        guidance_scale: of classifier-free guidance, 1 is none; LaytonGen's own, or 3 for a diffusion model by default.
        temperature: of LaytonGen.
        top_k: of LaytonGen; 0 for all codes.
        top_p: of LaytonGen; 1 for all codes.
        min_entropy: of LaytonGen, in nats; where it is surer of the next code, that is drawn plainly.
        candidates: of LaytonGen, images drawn for each one that is kept: the one that its judge likes best.
        no_layout: draw from prompts alone, without the planner that LaytonGen may have.
        weights: of LaytonGen while it draws: bf16, or int8 on a CPU, to be quicker; by default as they are saved.
        clip: folder of a CLIP model in transformers' format.
        resamples: bootstrap resamples for the spread of FD-effnet; 0 for none.
        seed: of the first image; the following images count up from it.
        batch_size: images at once.
        device: where to run; the accelerator if there is one.
        allow: dotted names, or their beginnings, of classes of your own that a saved part may name.
        json: write figures and protocol to this file as well.
    """
    from generation.evaluation import evaluate_generation as evaluate
    from layton.commands.evaluation_data import open_images
    from layton.metrics.external import ExternalSources

    require_least(1, {"count": count, "size": size, "batch_size": batch_size})
    require_least(0, {"seed": seed, "resamples": resamples})
    if resamples == 1:
        raise UsageError("--resamples must be 0 or at least 2: one draw has no spread")
    images = open_images(data, split=split, count=count, size=size, batch_size=batch_size * num_ranks())
    if images.count < 2:
        raise UsageError(f"two sets are compared: at least two images are needed, got {images.count}")
    sampling = SamplingChoice(
        guidance_scale,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_entropy=min_entropy,
        candidates=candidates,
        no_layout=no_layout,
    )
    loaded = load_drawer(
        kind,
        model,
        student=student,
        planner=planner,
        tokenizer=tokenizer,
        decoder=decoder,
        steps=steps,
        sampling=sampling,
        weights=weights,
        device=device,
        allow=allow,
    )
    facts = {"dataset": images.name, "split": split, "preprocessing": images.preprocessing, "size": size}
    with progress(images.count, "draw") as bar:
        report = evaluate(
            loaded.draw,
            captioned(images),
            protocol={**facts, **loaded.settings},
            seed=seed,
            sources=ExternalSources(clip=clip),
            num_resamples=resamples,
            on_progress=bar.update,
        )
    sys.stdout.write(report.summary() + "\n")
    images.tell_share()
    if json is not None:
        write_json(json, report.to_dict())


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
