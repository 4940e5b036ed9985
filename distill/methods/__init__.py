"""The distillation methods, each written once against the denoiser interface; `distill.method` is their border."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill.lazy import lazily

if TYPE_CHECKING:
    from distill.methods.hipa import HiPA
    from distill.methods.lcm import LCM
    from distill.methods.mlcm import MLCM
    from distill.methods.one_step import OneStepDistillation
    from distill.methods.progressive import ProgressiveDistillation
    from distill.methods.reflow import Reflow
    from distill.methods.scott import SCott

__all__ = [
    "LCM",
    "MLCM",
    "HiPA",
    "OneStepDistillation",
    "ProgressiveDistillation",
    "Reflow",
    "SCott",
]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "HiPA": "hipa",
        "LCM": "lcm",
        "MLCM": "mlcm",
        "OneStepDistillation": "one_step",
        "ProgressiveDistillation": "progressive",
        "Reflow": "reflow",
        "SCott": "scott",
    },
)
