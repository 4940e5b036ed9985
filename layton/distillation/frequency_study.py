"""The frequency study of one-step images (after HiPA, arXiv 2311.18158): which band is missing, and what it is worth.

Given images of one step and of many steps from the same noise: their radial power spectra, and what becomes of the
distance to the many-step images when one band of the one-step images is replaced by theirs. If the high band restores
most of the quality, high frequencies are what one step lacks. Results are written as JSON and PNG.

Legend: B batch, K bins, H W pixels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from einops import rearrange
from PIL import Image, ImageDraw
from torch import Tensor

from distill.frequency import radial_power_spectrum, swap_bands
from layton.folder import write_text
from layton.pictures import save_png

Distance = Callable[[Tensor, Tensor], Tensor]
"""Distance () of images (B, 3, H, W) in [-1, 1] from others."""

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf")
DEFAULT_RADII = (0.05, 0.1, 0.2, 0.3, 0.5)


@dataclass(frozen=True, slots=True)
class BandSwap:
    """What two swaps at one radius do to the distance from the many-step images."""

    radius: float  # share of Nyquist
    high_restored: float  # distance of low(one step) + high(many steps)
    low_restored: float  # distance of low(many steps) + high(one step)


@dataclass(frozen=True, slots=True)
class FrequencyStudy:
    """Figures of one study; spectra are means over images, power per ring of equal width up to Nyquist."""

    num_images: int
    distance: float  # of the one-step images from the many-step ones
    swaps: tuple[BandSwap, ...]
    spectra: dict[str, list[float]]  # name of the set -> (K,)
    upper_half_ratio: dict[str, float]  # power in the top half of the spectrum over that of the many-step images


@torch.no_grad()
def study_frequencies(
    many_steps: Tensor,
    one_step: Tensor,
    *,
    others: Mapping[str, Tensor] | None = None,
    distance: Distance | None = None,
    radii: Sequence[float] = DEFAULT_RADII,
    num_bins: int = 64,
    batch_size: int = 16,
) -> FrequencyStudy:
    """Compare same-noise images of one step and of many.

    Args:
        many_steps: (B, 3, H, W) in [-1, 1], the teacher's.
        one_step: (B, 3, H, W) in [-1, 1], from the same noises and prompts.
        others: More sets whose spectra are wanted, for example ``{"hipa": ...}``.
        distance: A perceptual one; default mean squared error.
        radii: Where bands are cut, shares of Nyquist.
        num_bins: K; made even, so that the top half is whole rings.
        batch_size: Images judged at once.

    Raises:
        ValueError: The sets differ in shape.
    """
    if many_steps.shape != one_step.shape:
        raise ValueError(f"images must pair up, got {tuple(many_steps.shape)} and {tuple(one_step.shape)}")
    measure = distance or _mean_squared_error
    num_bins += num_bins % 2
    sets = {"many_steps": many_steps, "one_step": one_step, **(others or {})}
    spectra = {name: _mean_spectrum(images, num_bins, batch_size) for name, images in sets.items()}
    reference = spectra["many_steps"][num_bins // 2 :].sum()
    swaps = tuple(
        BandSwap(
            radius,
            _mean_distance(measure, many_steps, _swap(radius, restore="high"), one_step, batch_size),
            _mean_distance(measure, many_steps, _swap(radius, restore="low"), one_step, batch_size),
        )
        for radius in radii
    )
    return FrequencyStudy(
        num_images=len(many_steps),
        distance=_mean_distance(measure, many_steps, lambda _, b: b, one_step, batch_size),
        swaps=swaps,
        spectra={name: spectrum.tolist() for name, spectrum in spectra.items()},
        upper_half_ratio={
            name: float(spectrum[num_bins // 2 :].sum() / reference) for name, spectrum in spectra.items()
        },
    )


def write_study(
    study: FrequencyStudy, folder: str | Path, *, many_steps: Tensor, one_step: Tensor, num_pictures: int = 4
) -> None:
    """Write ``study.json``, ``spectra.png``, ``swaps.png`` and, for a few images, ``bands.png``.

    Args:
        study: What was found.
        folder: Where to; made if needed.
        many_steps: (B, 3, H, W) the images of the study, for the picture of swapped bands.
        one_step: (B, 3, H, W).
        num_pictures: How many of them to show.
    """
    root = Path(folder)
    write_text(root / "study.json", json.dumps(asdict(study), indent=1) + "\n")
    count = len(study.spectra["many_steps"])
    places = [(index + 0.5) / count for index in range(count)]
    decibels = {name: (places, _decibels(values)) for name, values in study.spectra.items()}
    save_png(line_plot(decibels, title="radial power, dB over share of Nyquist"), root / "spectra.png")
    radii = [swap.radius for swap in study.swaps]
    curves = {
        "high band restored": (radii, [swap.high_restored for swap in study.swaps]),
        "low band restored": (radii, [swap.low_restored for swap in study.swaps]),
        "one step as it is": (radii, [study.distance] * len(radii)),
    }
    save_png(line_plot(curves, title="distance over radius of the swap"), root / "swaps.png")
    middle = study.swaps[len(study.swaps) // 2].radius
    many, one = many_steps[:num_pictures], one_step[:num_pictures]
    rows = [one, swap_bands(one, many, middle), swap_bands(many, one, middle), many]
    save_png(picture_of(rows), root / "bands.png")


def line_plot(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, title: str, size: tuple[int, int] = (640, 400)
) -> Image.Image:
    """A plain line plot with axes, the four extreme values and a legend.

    Args:
        curves: Name to (x, y), of any lengths.
        title: Written above.
        size: Width and height in pixels.

    Raises:
        ValueError: There is nothing to draw.
    """
    xs = [x for values, _ in curves.values() for x in values]
    ys = [y for _, values in curves.values() for y in values]
    if not xs or len(xs) != len(ys):
        raise ValueError("a plot needs curves with as many x as y")
    left, top, right, bottom = 70, 30, size[0] - 20, size[1] - 30
    low_x, low_y = min(xs), min(ys)
    span_x, span_y = (max(xs) - low_x) or 1.0, (max(ys) - low_y) or 1.0
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((left, top, right, bottom), outline="black")
    draw.text((left, 8), title, fill="black")
    draw.text((left, bottom + 8), f"{low_x:.3g}", fill="black")
    draw.text((right - 30, bottom + 8), f"{max(xs):.3g}", fill="black")
    draw.text((6, bottom - 10), f"{low_y:.3g}", fill="black")
    draw.text((6, top), f"{max(ys):.3g}", fill="black")
    for row, (name, (values_x, values_y)) in enumerate(curves.items()):
        colour = COLOURS[row % len(COLOURS)]
        points = [
            (left + (x - low_x) / span_x * (right - left), bottom - (y - low_y) / span_y * (bottom - top))
            for x, y in zip(values_x, values_y, strict=True)
        ]
        draw.line(points, fill=colour, width=2)
        draw.text((right - 160, top + 6 + 14 * row), name, fill=colour)
    return image


def picture_of(rows: Sequence[Tensor]) -> Image.Image:
    """Rows of images (B, 3, H, W) in [-1, 1] under one another, clamped."""
    tiled = rearrange(torch.stack(list(rows)), "r b c h w -> (r h) (b w) c")
    array = ((tiled.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()
    return Image.fromarray(array)


def _mean_squared_error(images: Tensor, targets: Tensor) -> Tensor:
    return (images - targets).square().mean()


def _swap(radius: float, *, restore: Literal["low", "high"]) -> Callable[[Tensor, Tensor], Tensor]:
    """Images of one step with one band taken from those of many, as a function of (many, one)."""

    def change(many: Tensor, one: Tensor) -> Tensor:
        return swap_bands(one, many, radius) if restore == "high" else swap_bands(many, one, radius)

    return change


def _mean_spectrum(images: Tensor, num_bins: int, batch_size: int) -> Tensor:
    return torch.cat([radial_power_spectrum(part, num_bins=num_bins) for part in images.split(batch_size)]).mean(dim=0)


def _mean_distance(
    measure: Distance, targets: Tensor, change: Callable[[Tensor, Tensor], Tensor], images: Tensor, batch_size: int
) -> float:
    """Mean distance of ``change(targets, images)`` from the targets, each batch weighted by its size."""
    total = 0.0
    for wanted, given in zip(targets.split(batch_size), images.split(batch_size), strict=True):
        total += float(measure(change(wanted, given), wanted)) * len(wanted)
    return total / len(targets)


def _decibels(power: Sequence[float]) -> list[float]:
    return (10.0 * torch.tensor(power).clamp(min=1e-12).log10()).tolist()
