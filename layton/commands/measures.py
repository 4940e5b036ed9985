"""Figures of single reconstructions, taken on 8-bit squares."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from layton.metrics.effnet import EfficientNetLite0

Measure = Callable[["Tensor", "Tensor"], "Tensor"]


class ImageMeasures:
    """PSNR, SSIM and, where the extra ``eval`` is installed, EPD of each image.

    Attributes:
        network: EPD's network, None if it is not there.
        absent: Measures that cannot be taken, with the reason.
    """

    def __init__(self) -> None:
        from layton.metrics.image import PSNR_CAP, psnr, ssim

        self.network: EfficientNetLite0 | None = None
        self.absent: dict[str, str] = {}
        self._measures: dict[str, Measure] = {
            "psnr": lambda images, originals: psnr(images, originals).clamp(max=PSNR_CAP),
            "ssim": ssim,
        }
        try:
            self._add_epd()
        except ImportError as error:
            self.absent["epd"] = str(error)

    def __call__(self, images: Tensor, originals: Tensor) -> list[dict[str, float]]:
        """Figures of each image.

        Args:
            images: (B, 3, H, W) in [-1, 1]; rounded to 8 bits first.
            originals: (B, 3, H, W) in [-1, 1].
        """
        from layton.metrics.image import round_to_uint8

        images, originals = round_to_uint8(images), round_to_uint8(originals)
        columns = {name: measure(images, originals).tolist() for name, measure in self._measures.items()}
        return [{name: column[row] for name, column in columns.items()} for row in range(len(images))]

    def _add_epd(self) -> None:
        from layton.metrics.perceptual import EPD

        epd = EPD()
        self.network = epd.network
        self._measures["epd"] = epd


def mean_figures(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean of each figure over images."""
    return {name: math.fsum(row[name] for row in rows) / len(rows) for name in rows[0]} if rows else {}


def in_words(figures: dict[str, float]) -> str:
    """Figures for people: 24.31 dB, SSIM 0.812, EPD 0.153."""
    words = [f"{figures['psnr']:.2f} dB", f"SSIM {figures['ssim']:.3f}"]
    if "epd" in figures:
        words.append(f"EPD {figures['epd']:.3f}")
    return ", ".join(words)
