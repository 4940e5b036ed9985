"""Trains the network behind the perceptual distance between latents.

The published network (L-LPIPS, arXiv 2406.05768) is trained on BAPPS, judgements that people made of distorted patches,
which are no part of this project. This is a stand-in in the manner of `layton.tasks.perceptual`: the network learns to
tell what was done to a latent, how strongly, and what the latent shows. It knows nothing of human judgement.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from distill.methods.latent_perceptual import LatentPerceptualNet
from layton.distillation.latent_perceptual import save_latent_perceptual
from layton.tasks.base import LRSchedulerCallable, OptimizerCallable, required
from layton.tasks.distortion import DistortionTask, blurred, coarsened, rescaled, warped


def blur(latent: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Gaussian blur of deviation up to 1.5 places."""
    return blurred(latent, 0.3 + 1.2 * strength, radius=3)


def noise(latent: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Gaussian noise of deviation up to 0.8."""
    return latent + (0.1 + 0.7 * strength) * torch.randn(latent.shape, generator=generator)


def quantise(latent: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Values rounded to multiples of up to 2."""
    step = 0.3 + 1.7 * strength
    return (latent / step).round() * step


def shrink(latent: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Down by up to a factor of 4 and up again."""
    return coarsened(latent, max(2, round(latent.shape[-1] / (1.3 + 2.7 * strength))))


def fade(latent: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Random places mixed with the latent's mean, up to half of them wholly."""
    mean = latent.mean(dim=(1, 2), keepdim=True).expand_as(latent)
    where = torch.rand(1, *latent.shape[1:], generator=generator) < 0.1 + 0.4 * strength
    return torch.where(where, torch.lerp(latent, mean, 0.3 + 0.7 * strength), latent)


def rescale(latent: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Gains and offsets of the channels changed."""
    return rescaled(latent, 0.1 + 0.5 * strength, 0.1 + 0.6 * strength, len(latent), generator)


def warp(latent: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """A smooth random displacement of up to about 1.5 places."""
    return warped(latent, 0.3 + 1.2 * strength, 4, generator)


DISTORTIONS: Final = (blur, noise, quantise, shrink, fade, rescale, warp)


class LatentPerceptualTask(DistortionTask):
    """`DistortionTask` on cached latents (`layton.ldm.cache.CachedLatents`).

    A share of the latents is then mixed with diffusion noise, because MLCM compares states of all noise levels.

    Args:
        net: The network; None builds `LatentPerceptualNet.small`.
        noisy_share: Share of samples noised as ``alpha x + sigma eps`` with sigma uniform in [0, 0.9], a guess of ours.
        optimizer: Makes the optimizer.
        lr_scheduler: Makes the learning-rate schedule.

    Raises:
        ValueError: ``noisy_share`` outside [0, 1].
    """

    net: LatentPerceptualNet

    def __init__(
        self,
        net: LatentPerceptualNet | None = None,
        *,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        noisy_share: float = 0.3,
    ) -> None:
        if not 0 <= noisy_share <= 1:
            raise ValueError(f"noisy_share must be in [0, 1], got {noisy_share}")
        own = net if net is not None else LatentPerceptualNet.small()
        super().__init__(own, DISTORTIONS, optimizer=optimizer, lr_scheduler=lr_scheduler)
        self.noisy_share = noisy_share

    def samples(self, batch: dict[str, Any]) -> Tensor:
        """Latents (B, C, h, w)."""
        return required(batch, "latent")[0].float()

    def damage(self, samples: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """See `DistortionTask.damage`; some of the samples are noised as well."""
        damaged, kinds, strengths = super().damage(samples, generator)
        size = len(samples)
        sigma = 0.9 * torch.rand(size, generator=generator) * (torch.rand(size, generator=generator) < self.noisy_share)
        sigma = sigma.reshape(-1, 1, 1, 1)
        eps = torch.randn(samples.shape, generator=generator)
        return (1 - sigma**2).sqrt() * damaged + sigma * eps, kinds, strengths

    def export(self, folder: Path) -> None:
        """Write the network without its heads; `layton.distillation.latent_perceptual` reads it."""
        save_latent_perceptual(self.net, folder)
