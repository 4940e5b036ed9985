"""``layton evaluate decoders``: steps, quality and speed of all decoders of a tokenizer, in one table."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from layton.data.types import Share
from layton.folder import write_json
from layton.options import require_least
from layton.progress import progress

if TYPE_CHECKING:
    from torch import Tensor

    from layton.data.evaluation import EvaluationImages
    from layton.metrics.report import ReconstructionReport
    from layton.tokenizer import LaytonTokenizer


@dataclass(frozen=True, slots=True, eq=False)
class Variant:
    """A decoder of a tokenizer in a number of steps; to the evaluation, one way to reconstruct images.

    Attributes:
        model: The tokenizer.
        decoder: Name of the decoder.
        steps: Network evaluations.
        seed: Of the noise, the same for every image.
    """

    model: LaytonTokenizer
    decoder: str
    steps: int
    seed: int

    @property
    def name(self) -> str:
        """Key in reports."""
        return f"{self.decoder}, {self.steps}"

    @property
    def description(self) -> str:
        """For the protocol."""
        part = self.model.decoder(self.decoder)
        return f"decoder {self.decoder!r} in {self.steps} steps, scale {part.default_scale}, {part.sampling_record()}"

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, N) -> images (B, 3, S, S) in [-1, 1], on the CPU."""
        from layton.loading import same_noise

        noise = same_noise(self.seed, len(codes))
        return self.model.decode(codes, decoder=self.decoder, num_steps=self.steps, generator=noise).cpu()

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to the same, on the CPU."""
        from layton.loading import same_noise

        noise = same_noise(self.seed, len(images))
        return self.model.reconstruct(images, decoder=self.decoder, num_steps=self.steps, generator=noise).cpu()


@dataclass(frozen=True, slots=True)
class Row:
    """Figures of one variant; None where they could not be or were not to be measured.

    Attributes:
        decoder: Name.
        steps: Network evaluations.
        psnr: Mean over images, in dB.
        gap: Mean over images of its distance from the reference's, in dB; negative is worse.
        gap_error: Standard error of that mean.
        epd: Mean over images.
        fd_effnet: Between the originals and what came back.
        objects: Share of scenes of which all objects are kept.
        seconds: For one image, codes to pixels, in a batch; median over rounds.
        time_ratio: Seconds over the reference's of the same round; median over rounds.
    """

    decoder: str
    steps: int
    psnr: float
    gap: float
    gap_error: float
    epd: float | None
    fd_effnet: float | None
    objects: float | None
    seconds: float
    time_ratio: float


def evaluate_decoders(
    *,
    data: list[str],
    split: Share = "test",
    count: int | None = None,
    size: int = 256,
    image_column: str | None = None,
    tokenizer: str = "mini",
    decoders: list[str] | None = None,
    any_steps: list[int] | None = None,
    objects: int = 0,
    repeats: int = 5,
    seed: int = 0,
    batch_size: int = 8,
    device: str | None = None,
    allow: list[str] | None = None,
    json: Path | None = None,
) -> None:
    """Measure every decoder in every number of steps that it was trained for: PSNR, EPD, FD-effnet, time.

    Gaps and times are relative to the tokenizer's default decoder in its default steps, or else to the first row.

    Args:
        data: the word scenes, a folder of images, tar shards (files or patterns), or a table.
        split: train, validation or test; all takes every stored image.
        count: images to take from the start of the split; 1,000 scenes or all stored images by default.
        size: side in pixels to which images are cropped and scaled.
        image_column: of a table; "image" by default.
        tokenizer: embedded tokenizer or folder.
        decoders: names of those to measure; all by default.
        any_steps: steps for decoders that take any number; their own default number by default.
        objects: on so many scenes of the split, also count how often shape and colour of every object are kept.
        repeats: rounds of the timing; in each every variant decodes one batch.
        seed: of the noise that decoders begin with, the same for every image.
        batch_size: images at once.
        device: where to run; the accelerator if there is one.
        allow: dotted names, or their beginnings, of classes of your own that a saved part may name.
        json: write figures and protocol to this file as well.
    """
    require_least(1, {"batch_size": batch_size, "count": count, "size": size, "repeats": repeats})
    require_least(0, {"seed": seed, "objects": objects})
    from layton.data.evaluation import open_images, scenes_of
    from layton.loading import load_tokenizer
    from layton.ranks import num_ranks
    from layton.sceneval.objects import objects_kept

    model = load_tokenizer(tokenizer, decoders=decoders, device=device, allow=allow)
    variants = variants_of(model, any_steps, seed=seed)
    images = open_images(data, split=split, count=count, size=size, batch_size=batch_size, image_column=image_column)
    codes = model.encode(next(iter(images)))
    times = seconds_per_image(variants, codes, repeats=repeats)
    report = measure(variants, images, tokenizer)
    kept: dict[str, float] = {}
    for variant in variants if objects else ():
        found = objects_kept(variant.reconstruct, objects, split=scenes_of(split), size=size, batch_size=batch_size)
        kept[variant.name] = found.kept
    rows = rows_of(variants, report, kept, times)
    absent = "".join(f"no {name}: {reason}\n" for name, reason in report.absent.items() if name != "codebook")
    sys.stdout.write(table(rows) + absent)
    images.tell_share()
    if json is not None:
        figures = {
            "rows": [asdict(row) for row in rows],
            "reference": variants[0].name,
            "timing": {"batch_size": len(codes), "rounds": repeats, "processes": num_ranks()},
            "scenes_with_objects": objects,
            "report": report.to_dict(),
        }
        write_json(json, figures)


def variants_of(model: LaytonTokenizer, any_steps: Sequence[int] | None, *, seed: int = 0) -> list[Variant]:
    """All decoders in all their numbers of steps; the reference, the default decoder in its default steps, first.

    Raises:
        ValueError: There is no decoder, or a number of steps is below 1.
    """
    if any_steps is not None and (not any_steps or min(any_steps) < 1):
        raise ValueError(f"any_steps must be numbers >= 1, got {list(any_steps)}")
    if not len(model.decoders):
        raise ValueError("the tokenizer has no decoder")
    found = []
    for name in model.decoders:
        decoder = model.decoder(name)
        steps = decoder.steps if decoder.steps is not None else tuple(any_steps or (decoder.default_steps,))
        found += [Variant(model, name, number, seed) for number in sorted(set(steps))]
    chosen = (model.default_decoder, model.decoder().default_steps)
    return sorted(found, key=lambda variant: (variant.decoder, variant.steps) != chosen)


def seconds_per_image(variants: Sequence[Variant], codes: Tensor, *, repeats: int) -> dict[str, list[float]]:
    """Seconds from codes (B, N) to pixels for each image, by variant and round.

    Variants take turns, so that other work on the machine hits all of them; a first round of warming up is not counted.
    """
    times: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for number in range(repeats + 1):
        for variant in variants:
            started = time.perf_counter()
            variant.decode(codes)
            if number:
                times[variant.name].append((time.perf_counter() - started) / len(codes))
    return times


def measure(variants: Sequence[Variant], images: EvaluationImages, name: str) -> ReconstructionReport:
    """One report of all variants on the same images: the first as its model, the others as its references."""
    from layton.loading import decoding_facts
    from layton.metrics import Protocol, evaluate_reconstruction

    first = variants[0]
    protocol = Protocol(
        dataset=images.name,
        split=images.split,
        preprocessing=images.preprocessing,
        model=f"{name}, codebook {first.model.fingerprint()}",
        **decoding_facts(first.model, first.decoder, num_steps=first.steps, conditioning_scale=None, seed=first.seed),
    )
    with progress(len(images.numbers), "evaluate") as bar:
        return evaluate_reconstruction(
            first.reconstruct,
            images,
            protocol=protocol,
            references=variants[1:],
            bootstrap=0,
            on_batch=bar.update,
            device=first.model.device,
        )


def rows_of(
    variants: Sequence[Variant],
    report: ReconstructionReport,
    kept: Mapping[str, float],
    times: Mapping[str, Sequence[float]],
) -> list[Row]:
    """Figures side by side."""
    first = variants[0]
    rows = []
    for variant in variants:
        scores = report.model if variant is first else report.references[variant.name]
        ahead = None if variant is first else report.gains[variant.name]["psnr"]  # of the reference
        epd, distance = scores.measurements.get("epd"), scores.frechet.get("fd_effnet")
        ratios = [own / other for own, other in zip(times[variant.name], times[first.name], strict=True)]
        rows.append(
            Row(
                variant.decoder,
                variant.steps,
                psnr=scores["psnr"].mean,
                gap=0.0 if ahead is None else -ahead.mean,
                gap_error=0.0 if ahead is None else ahead.standard_error,
                epd=None if epd is None else epd.mean,
                fd_effnet=None if distance is None else distance.value,
                objects=kept.get(variant.name),
                seconds=statistics.median(times[variant.name]),
                time_ratio=statistics.median(ratios),
            )
        )
    return rows


def table(rows: Sequence[Row]) -> str:
    """Rows for people."""
    lines: list[tuple[str, ...]] = [
        ("decoder", "steps", "PSNR dB", "gap dB", "EPD", "FD-effnet", "objects", "ms/image", "time")
    ]
    for row in rows:
        figures: list[tuple[float | None, str]] = [
            (row.psnr, ".2f"), (row.gap, "+.2f"), (row.epd, ".4f"), (row.fd_effnet, ".2f"), (row.objects, ".1%"),
            (1000 * row.seconds, ".1f"), (row.time_ratio, ".2f"),
        ]  # fmt: skip
        cells = ("-" if value is None else format(value, form) for value, form in figures)
        lines.append((row.decoder, str(row.steps), *cells))
    return "".join(f"{line[0]:<14}" + "".join(f"{cell:>11}" for cell in line[1:]) + "\n" for line in lines)
