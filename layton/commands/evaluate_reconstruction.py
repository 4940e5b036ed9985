"""``layton evaluate reconstruction``: every measure of a tokenizer or an autoencoder, with references and protocol."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layton.data.types import Share
from layton.folder import write_json
from layton.options import refuse_given, require_least
from layton.progress import progress

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from layton.data.evaluation import EvaluationImages
    from layton.metrics.report import ReconstructionReport

_LATENT_NUMBERS = 16  # numbers per 16x16 patch of the embedded autoencoder, for the reference "pca"


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """What is evaluated.

    Attributes:
        reconstruct: Images (B, 3, H, W) in [-1, 1] to the same.
        encode: Images to codes (B, N), None for an autoencoder.
        vocab_size: V, None for an autoencoder.
        numbers: Numbers per 16x16 patch of the reference "pca".
        facts: Fields of the protocol.
        device: Where it works.
    """

    reconstruct: Callable[[Tensor], Tensor]
    encode: Callable[[Tensor], Tensor] | None
    vocab_size: int | None
    numbers: int
    facts: dict[str, Any]
    device: torch.device


def evaluate_reconstruction(
    *,
    data: list[str],
    split: Share = "test",
    count: int | None = None,
    size: int = 256,
    image_column: str | None = None,
    tokenizer: str | None = None,
    decoder: str | None = None,
    steps: int | None = None,
    condition_scale: float | None = None,
    autoencoder: Path | None = None,
    objects: int = 0,
    seed: int | None = None,
    batch_size: int = 8,
    device: str | None = None,
    allow: list[str] | None = None,
    json: Path | None = None,
) -> None:
    """Measure reconstructions: PSNR, SSIM, EPD, FD-effnet and use of the codebook, beside two references.

    The references, on the same images, are "palette" (cell means) and "pca" (a linear autoencoder). LPIPS,
    DISTS and FID join where their weights are on disk; what is not measured is listed with the reason.

    Args:
        data: the word scenes, a folder of images, tar shards (files or patterns), or a table.
        split: train, validation or test; all takes every stored image.
        count: images to take from the start of the split; 1,000 scenes or all stored images by default.
        size: side in pixels to which images are cropped and scaled.
        image_column: of a table; "image" by default.
        tokenizer: embedded tokenizer or folder; mini by default.
        decoder: name of the code decoder; the tokenizer's own choice by default.
        steps: network evaluations of the decoder; its own number by default.
        condition_scale: strength of the codes, where the decoder has such a thing.
        autoencoder: folder of a diffusers AutoencoderKL (or of a pipeline with one), to evaluate it alone instead.
        objects: on so many scenes of the split, also count how often shape and colour of every object are kept.
        seed: of the noise that decoders begin with, the same for every image; 0 by default.
        batch_size: images at once.
        device: where to run; the accelerator if there is one.
        allow: dotted names, or their beginnings, of classes of your own that a saved part may name.
        json: write figures and protocol to this file as well.
    """
    from layton.data.evaluation import open_images, scenes_of
    from layton.sceneval.objects import objects_kept

    require_least(1, {"batch_size": batch_size, "count": count, "size": size, "steps": steps})
    require_least(0, {"seed": seed, "objects": objects})
    if autoencoder is not None:
        others: dict[str, object] = {"tokenizer": tokenizer, "decoder": decoder, "steps": steps, "seed": seed}
        refuse_given(
            {**others, "condition_scale": condition_scale, "allow": allow}, "of tokenizers, not --autoencoder's"
        )
        subject = autoencoder_alone(autoencoder, device)
    else:
        subject = tokenizer_with(tokenizer or "mini", decoder, steps, condition_scale, seed or 0, device, allow)
    images = open_images(data, split=split, count=count, size=size, batch_size=batch_size, image_column=image_column)
    report = measure(subject, images)
    figures = report.to_dict()
    lines = [report.summary(), *gains_in_words(report)]
    if objects:
        kept = objects_kept(subject.reconstruct, objects, split=scenes_of(split), size=size, batch_size=batch_size)
        figures["objects"] = kept.to_dict()
        lines.append(kept.summary())
    lines += [f"no {name}: {reason}" for name, reason in report.absent.items()]
    sys.stdout.write("\n".join(lines) + "\n")
    images.tell_share()
    if json is not None:
        write_json(json, figures)


def measure(subject: Subject, images: EvaluationImages) -> ReconstructionReport:
    """All measures on all images.

    Raises:
        ValueError: If an image is broken or a result is not finite.
    """
    from layton.metrics import Protocol, evaluate_reconstruction, load_external

    protocol = Protocol(
        dataset=images.name,
        split=images.split,
        preprocessing=images.preprocessing,
        **subject.facts,
    )
    with progress(len(images.numbers), "evaluate") as bar:
        return evaluate_reconstruction(
            subject.reconstruct,
            images,
            protocol=protocol,
            encode=subject.encode,
            vocab_size=subject.vocab_size,
            num_components=subject.numbers,
            external=load_external(),
            on_batch=bar.update,
            device=subject.device,
        )


def tokenizer_with(
    name: str,
    decoder: str | None,
    steps: int | None,
    scale: float | None,
    seed: int,
    device: str | None,
    allow: list[str] | None = None,
) -> Subject:
    """A tokenizer with one of its decoders.

    Raises:
        ValueError: If one of them does not exist, or the decoder refuses the steps.
    """
    from layton.loading import decoding_facts, load_with_decoder, same_noise

    model, chosen = load_with_decoder(name, decoder, num_steps=steps, device=device, allow=allow)

    def reconstruct(images: Tensor) -> Tensor:
        noise = same_noise(seed, len(images))
        return model.reconstruct(images, decoder=chosen, num_steps=steps, conditioning_scale=scale, generator=noise)

    facts = {
        "model": f"{name}, codebook {model.fingerprint()}",
        **decoding_facts(model, chosen, num_steps=steps, conditioning_scale=scale, seed=seed),
    }
    return Subject(reconstruct, model.encode, model.vocab_size, _LATENT_NUMBERS, facts, model.device)


def autoencoder_alone(folder: Path, device: str | None) -> Subject:
    """A diffusers autoencoder without codes.

    Raises:
        ValueError: If the folder holds none.
    """
    import torch

    from layton.devices import choose_device
    from layton.ldm.autoencoder import Autoencoder

    target = choose_device(device)
    model = Autoencoder.from_pretrained(folder).to(target).float().eval()

    @torch.no_grad()
    def reconstruct(images: Tensor) -> Tensor:
        return model.reconstruct(images.to(target))

    numbers = max(1, model.latent_channels * 16**2 // model.downsample_factor**2)
    return Subject(reconstruct, None, None, numbers, {"model": f"autoencoder {folder}"}, target)


def gains_in_words(report: ReconstructionReport) -> list[str]:
    """How far the model is ahead of each reference, image by image."""
    lines = []
    for name, gain in report.gains.items():
        decibels = gain["psnr"]
        words = f"{decibels.mean:+.2f} +- {decibels.standard_error:.2f} dB"
        reference, epd = report.references[name].measurements.get("epd"), report.model.measurements.get("epd")
        if reference is not None and epd is not None and reference.mean > 0:
            words += f", EPD {epd.mean / reference.mean:.2f} times as large"
        lines.append(f"model against {name}: {words}")
    return lines
