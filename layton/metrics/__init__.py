"""Measures of reconstruction and of codebooks, each with its protocol.

Names are imported on first use: torchmetrics and timm are slow to load and `import layton.metrics` must not be.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill.lazy import lazily

if TYPE_CHECKING:
    from layton.metrics.codebook import CodebookReport, CodebookStatistics
    from layton.metrics.colour import colour_errors
    from layton.metrics.external import ExternalSources, load_external
    from layton.metrics.frechet import FrechetEffNetDistance, bootstrap_spread, frechet_distance
    from layton.metrics.image import psnr, round_to_uint8, ssim
    from layton.metrics.perceptual import EPD
    from layton.metrics.protocol import Protocol
    from layton.metrics.reconstruction import evaluate_reconstruction
    from layton.metrics.references import Palette, PatchPCA, fit_references
    from layton.metrics.report import ReconstructionReport

_HOME = {
    "CodebookReport": "codebook",
    "CodebookStatistics": "codebook",
    "colour_errors": "colour",
    "ExternalSources": "external",
    "load_external": "external",
    "FrechetEffNetDistance": "frechet",
    "bootstrap_spread": "frechet",
    "frechet_distance": "frechet",
    "psnr": "image",
    "round_to_uint8": "image",
    "ssim": "image",
    "EPD": "perceptual",
    "Protocol": "protocol",
    "evaluate_reconstruction": "reconstruction",
    "Palette": "references",
    "PatchPCA": "references",
    "fit_references": "references",
    "ReconstructionReport": "report",
}

__all__ = [
    "EPD",
    "CodebookReport",
    "CodebookStatistics",
    "ExternalSources",
    "FrechetEffNetDistance",
    "Palette",
    "PatchPCA",
    "Protocol",
    "ReconstructionReport",
    "bootstrap_spread",
    "colour_errors",
    "evaluate_reconstruction",
    "fit_references",
    "frechet_distance",
    "load_external",
    "psnr",
    "round_to_uint8",
    "ssim",
]

__getattr__, __dir__ = lazily(__name__, _HOME)
