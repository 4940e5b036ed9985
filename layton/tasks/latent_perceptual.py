"""Trains the network behind the perceptual distance between latents.

The published network (L-LPIPS, arXiv 2406.05768) is trained on BAPPS, judgements that people made of distorted patches,
which are no part of this project. This is a stand-in in the manner of `layton.tasks.perceptual`: the network learns to
tell what was done to a latent, how strongly, and what the latent shows. It knows nothing of human judgement.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from distill.methods.latent_perceptual import LatentPerceptualNet
from layton.distillation.latent_perceptual import save_latent_perceptual
from layton.tasks.base import LaytonTask, LRSchedulerCallable, OptimizerCallable
from layton.tasks.perceptual import WORDS, word_targets


def blur(latent: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Gaussian blur of deviation up to 1.5 places."""
    sigma = 0.3 + 1.2 * strength
    x = torch.arange(-3, 4, dtype=torch.float32)
    kernel = torch.exp(-(x**2) / (2 * sigma**2))
    channels = len(latent)
    kernel = (kernel / kernel.sum()).repeat(channels, 1, 1, 1)
    padded = F.pad(latent[None], (3, 3, 3, 3), mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel, groups=channels), kernel.transpose(2, 3), groups=channels)[0]


def noise(latent: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Gaussian noise of deviation up to 0.8."""
    return latent + (0.1 + 0.7 * strength) * torch.randn(latent.shape, generator=generator)


def quantise(latent: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Values rounded to multiples of up to 2."""
    step = 0.3 + 1.7 * strength
    return (latent / step).round() * step


def shrink(latent: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Down by up to a factor of 4 and up again."""
    size = max(2, round(latent.shape[-1] / (1.3 + 2.7 * strength)))
    small = F.interpolate(latent[None], size=(size, size), mode="area")
    return F.interpolate(small, size=latent.shape[-2:], mode="bilinear")[0]


def fade(latent: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Random places mixed with the latent's mean, up to half of them wholly."""
    mean = latent.mean(dim=(1, 2), keepdim=True).expand_as(latent)
    where = torch.rand(1, *latent.shape[1:], generator=generator) < 0.1 + 0.4 * strength
    return torch.where(where, torch.lerp(latent, mean, 0.3 + 0.7 * strength), latent)


def rescale(latent: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Gains and offsets of the channels changed."""
    channels = len(latent)
    gains = 1 + (0.1 + 0.5 * strength) * (2 * torch.rand(channels, 1, 1, generator=generator) - 1)
    shift = (0.1 + 0.6 * strength) * (2 * torch.rand(channels, 1, 1, generator=generator) - 1)
    return latent * gains + shift


def warp(latent: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """A smooth random displacement of up to about 1.5 places."""
    places = (0.3 + 1.2 * strength) * 2 / latent.shape[-1]
    coarse = torch.randn(1, 2, 4, 4, generator=generator) * places
    offsets = rearrange(F.interpolate(coarse, size=latent.shape[-2:], mode="bicubic"), "b c h w -> b h w c")
    identity = F.affine_grid(torch.eye(2, 3)[None], [1, *latent.shape], align_corners=False)
    return F.grid_sample(latent[None], identity + offsets, padding_mode="reflection", align_corners=False)[0]


DISTORTIONS: Final = (blur, noise, quantise, shrink, fade, rescale, warp)


class LatentPerceptualTask(LaytonTask):
    """Distortion identification and word presence on cached latents (`layton.ldm.cache.CachedLatents`).

    A share of the latents is then mixed with diffusion noise, because MLCM compares states of all noise levels.

    Args:
        net: The network; None builds `LatentPerceptualNet.small`.
        noisy_share: Share of samples noised as ``alpha x + sigma eps`` with sigma uniform in [0, 0.9], a guess of ours.
        optimizer: Makes the optimizer.
        lr_scheduler: Makes the learning-rate schedule.

    Raises:
        ValueError: ``noisy_share`` outside [0, 1].
    """

    def __init__(
        self,
        net: LatentPerceptualNet | None = None,
        *,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        noisy_share: float = 0.3,
    ) -> None:
        super().__init__(optimizer=optimizer, lr_scheduler=lr_scheduler)
        if not 0 <= noisy_share <= 1:
            raise ValueError(f"noisy_share must be in [0, 1], got {noisy_share}")
        self.net = net if net is not None else LatentPerceptualNet.small()
        self.noisy_share = noisy_share
        width = 2 * sum(self.net.widths)
        self.kind = nn.Linear(width, len(DISTORTIONS) + 1)
        self.strength = nn.Linear(width, 1)
        self.words = nn.Linear(width, len(WORDS))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of one batch, ()."""
        return self._loss(batch, self.step_generator("distortion", device="cpu"))

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of one batch with distortions that depend on its position only, ()."""
        return self._loss(batch, torch.Generator().manual_seed(batch_idx))

    def export(self, folder: Path) -> None:
        """Write the network without its heads; `layton.distillation.latent_perceptual` reads it."""
        save_latent_perceptual(self.net, folder)

    def _loss(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        latents, kinds, strengths = self._damage(batch["latent"].float().cpu(), generator)
        latents, kinds, strengths = (value.to(self.device) for value in (latents, kinds, strengths))
        pooled = torch.cat(
            [statistic for level in self.net(latents) for statistic in (level.mean((2, 3)), level.amax((2, 3)))], dim=1
        )
        logits = self.kind(pooled)
        present, known = word_targets(batch["caption"], batch["key"], self.device)
        word_loss = F.binary_cross_entropy_with_logits(self.words(pooled).float(), present, reduction="none").mean(1)
        terms = {
            "kind": F.cross_entropy(logits.float(), kinds),
            "strength": ((self.strength(pooled)[:, 0].sigmoid() - strengths).square() * (kinds > 0)).mean(),
            "words": (word_loss * known).sum() / known.sum().clamp(min=1),
        }
        self.log_measure("kind_accuracy", logits.argmax(1) == kinds)
        return self.log_losses(terms, batch_size=len(kinds))

    def _damage(self, latents: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Damaged latents (B, C, h, w), kinds (B,) with 0 for none, and strengths (B,) in [0, 1]."""
        size = len(latents)
        kinds = torch.randint(len(DISTORTIONS) + 1, (size,), generator=generator)
        strengths = torch.rand(size, generator=generator)
        damaged = torch.stack(
            [
                latent if kind == 0 else DISTORTIONS[int(kind) - 1](latent, float(strength), generator)
                for latent, kind, strength in zip(latents, kinds, strengths, strict=True)
            ]
        )
        sigma = 0.9 * torch.rand(size, generator=generator) * (torch.rand(size, generator=generator) < self.noisy_share)
        sigma = sigma.reshape(-1, 1, 1, 1)
        eps = torch.randn(latents.shape, generator=generator)
        return (1 - sigma**2).sqrt() * damaged + sigma * eps, kinds, strengths
