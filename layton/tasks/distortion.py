"""What trains networks behind perceptual distances: tell what was done to a sample, how strongly, and what it shows."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from distill.methods.latent_perceptual import LatentPerceptualNet
from layton.losses.perceptual import PerceptualNet
from layton.scenes import COLOURS, SHAPES, seed_of_key
from layton.tasks.base import LaytonTask, LRSchedulerCallable, OptimizerCallable

WORDS: Final = (*COLOURS, *SHAPES)

Distortion = Callable[[Tensor, float, torch.Generator], Tensor]
"""``(sample (C, H, W), strength in [0, 1], generator) -> sample``, all on the CPU."""


class DistortionTask(LaytonTask):
    """Distortion identification and word presence.

    Every sample is damaged in a random way (or left whole); from pooled features of all stages three linear heads tell
    which way, how strongly, and, for Scenes, which of the 18 words of the caption (colours and shapes) apply.

    Args:
        net: The network to train, which gives features (B, widths[i], h_i, w_i) of all its stages.
        distortions: Ways to damage a sample.
        optimizer: Makes the optimizer.
        lr_scheduler: Makes the learning-rate schedule.
    """

    def __init__(
        self,
        net: PerceptualNet | LatentPerceptualNet,
        distortions: Sequence[Distortion],
        *,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(optimizer=optimizer, lr_scheduler=lr_scheduler)
        self.net = net
        self.distortions = tuple(distortions)
        width = 2 * sum(net.widths)
        self.kind = nn.Linear(width, len(distortions) + 1)
        self.strength = nn.Linear(width, 1)
        self.words = nn.Linear(width, len(WORDS))

    @abstractmethod
    def samples(self, batch: Any) -> Tensor:
        """What is damaged, (B, C, H, W)."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss of one batch, ()."""
        return self._loss(batch, self.step_generator("distortion", device="cpu"))

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss of one batch with distortions that depend on its position only, ()."""
        return self._loss(batch, torch.Generator().manual_seed(batch_idx))

    def damage(self, samples: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Damaged samples (B, C, H, W), kinds (B,) with 0 for none, and strengths (B,) in [0, 1]."""
        kinds = torch.randint(len(self.distortions) + 1, (len(samples),), generator=generator)
        strengths = torch.rand(len(samples), generator=generator)
        damaged = [
            sample if kind == 0 else self.distortions[int(kind) - 1](sample, float(strength), generator)
            for sample, kind, strength in zip(samples, kinds, strengths, strict=True)
        ]
        return torch.stack(damaged), kinds, strengths

    def _loss(self, batch: Any, generator: torch.Generator) -> Tensor:
        damaged = self.damage(self.samples(batch).cpu(), generator)
        samples, kinds, strengths = (value.to(self.device) for value in damaged)
        pooled = torch.cat(
            [statistic for level in self.net(samples) for statistic in (level.mean((2, 3)), level.amax((2, 3)))], dim=1
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


def word_targets(captions: list[str], keys: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """Which words each caption holds (B, 18), and which samples are English Scenes, so that it is known (B,)."""
    present = torch.tensor([[float(word in caption) for word in WORDS] for caption in captions], device=device)
    known = torch.tensor([float(seed_of_key(key) is not None) for key in keys], device=device)
    return present, known * (present.sum(1) > 0)


def blurred(sample: Tensor, sigma: float, radius: int) -> Tensor:
    """A sample (C, H, W) after a Gaussian blur of deviation ``sigma``, cut off at ``radius`` places."""
    x = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-(x**2) / (2 * sigma**2))
    channels = len(sample)
    kernel = (kernel / kernel.sum()).repeat(channels, 1, 1, 1)
    padded = F.pad(sample[None], (radius,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel, groups=channels), kernel.transpose(2, 3), groups=channels)[0]


def coarsened(sample: Tensor, size: int) -> Tensor:
    """A sample (C, H, W) shrunk to squares of ``size`` and enlarged again."""
    small = F.interpolate(sample[None], size=(size, size), mode="area")
    return F.interpolate(small, size=sample.shape[-2:], mode="bilinear")[0]


def rescaled(sample: Tensor, gain: float, shift: float, shifted: int, generator: torch.Generator) -> Tensor:
    """A sample (C, H, W) with each channel's gain changed by up to ``gain``, and its offset by up to ``shift``.

    ``shifted`` is the number of offsets: 1 for one of all channels, or theirs.
    """
    gains = 1 + gain * (2 * torch.rand(len(sample), 1, 1, generator=generator) - 1)
    return sample * gains + shift * (2 * torch.rand(shifted, 1, 1, generator=generator) - 1)


def warped(sample: Tensor, places: float, knots: int, generator: torch.Generator) -> Tensor:
    """A sample (C, H, W) after a smooth displacement of deviation ``places``, random at ``knots``^2 points."""
    coarse = torch.randn(1, 2, knots, knots, generator=generator) * (places * 2 / sample.shape[-1])
    offsets = rearrange(F.interpolate(coarse, size=sample.shape[-2:], mode="bicubic"), "b c h w -> b h w c")
    identity = F.affine_grid(torch.eye(2, 3)[None], [1, *sample.shape], align_corners=False)
    return F.grid_sample(sample[None], identity + offsets, padding_mode="reflection", align_corners=False)[0]
