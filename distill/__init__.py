"""Diffusion and flow mathematics, and the distillation methods written against it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill.lazy import lazily

if TYPE_CHECKING:
    from distill.adapters import LoraSettings
    from distill.condition import Condition
    from distill.denoiser import Denoiser, GuidedDenoiser
    from distill.few_step import FewStepSampling
    from distill.method import DistillationMethod, DistillBatch, Networks
    from distill.methods import LCM, MLCM, HiPA, OneStepDistillation, ProgressiveDistillation, Reflow, SCott
    from distill.models import FlowTransformerDenoiser, UNetDenoiser
    from distill.schedules import FlowSchedule, VPSchedule
    from distill.toy import GaussianMixtureDenoiser

__all__ = [
    "LCM",
    "MLCM",
    "Condition",
    "Denoiser",
    "DistillBatch",
    "DistillationMethod",
    "FewStepSampling",
    "FlowSchedule",
    "FlowTransformerDenoiser",
    "GaussianMixtureDenoiser",
    "GuidedDenoiser",
    "HiPA",
    "LoraSettings",
    "Networks",
    "OneStepDistillation",
    "ProgressiveDistillation",
    "Reflow",
    "SCott",
    "UNetDenoiser",
    "VPSchedule",
]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "Condition": "condition",
        "Denoiser": "denoiser",
        "DistillBatch": "method",
        "DistillationMethod": "method",
        "FewStepSampling": "few_step",
        "FlowSchedule": "schedules",
        "FlowTransformerDenoiser": "models",
        "GaussianMixtureDenoiser": "toy",
        "GuidedDenoiser": "denoiser",
        "HiPA": "methods",
        "LCM": "methods",
        "LoraSettings": "adapters",
        "MLCM": "methods",
        "Networks": "method",
        "OneStepDistillation": "methods",
        "ProgressiveDistillation": "methods",
        "Reflow": "methods",
        "SCott": "methods",
        "UNetDenoiser": "models",
        "VPSchedule": "schedules",
    },
)
