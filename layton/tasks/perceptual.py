"""Trains the small network behind the perceptual loss: tell what was done to an image, and what it shows."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from layton.data.types import ImageBatch
from layton.losses.perceptual import PerceptualNet
from layton.scenes import COLOURS, SHAPES, seed_of_key
from layton.tasks.base import LaytonTask, LRSchedulerCallable, OptimizerCallable

WORDS: Final = (*COLOURS, *SHAPES)


def blur(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Gaussian blur of deviation up to 3 pixels."""
    sigma = 0.4 + 2.6 * strength
    x = torch.arange(-7, 8, dtype=torch.float32)
    kernel = torch.exp(-(x**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).repeat(3, 1, 1, 1)
    padded = F.pad(image[None], (7, 7, 7, 7), mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.transpose(2, 3), groups=3)[0]


def noise(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Gaussian noise of deviation up to 0.3."""
    return image + (0.03 + 0.27 * strength) * torch.randn(image.shape, generator=generator)


def jpeg(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """JPEG of quality 50 down to 5."""
    pixels = rearrange((image.clamp(-1, 1) + 1) * 127.5, "c h w -> h w c").round().to(torch.uint8).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=round(50 - 45 * strength))
    decoded = np.asarray(Image.open(buffer))
    return rearrange(torch.from_numpy(decoded.copy()), "h w c -> c h w").float() / 127.5 - 1


def shrink(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Down by up to a factor of 8 and up again."""
    size = max(4, round(image.shape[-1] / (1.5 + 6.5 * strength)))
    small = F.interpolate(image[None], size=(size, size), mode="area")
    return F.interpolate(small, size=image.shape[-2:], mode="bilinear")[0]


def blocks(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Each 8- or 16-pixel block mixed with its mean."""
    side = 8 if strength < 0.5 else 16
    means = F.avg_pool2d(image[None], side, ceil_mode=True)
    blocky = F.interpolate(means, scale_factor=float(side), mode="nearest")[0, :, : image.shape[1], : image.shape[2]]
    return torch.lerp(image, blocky, 0.2 + 0.8 * strength)


def recolour(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Contrast, brightness and channel gains changed."""
    gains = 1 + (0.1 + 0.5 * strength) * (2 * torch.rand(3, 1, 1, generator=generator) - 1)
    shift = (0.05 + 0.3 * strength) * (2 * torch.rand(1, 1, 1, generator=generator) - 1)
    return image * gains + shift


def warp(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """A smooth random displacement of up to 6 pixels."""
    pixels = (1 + 5 * strength) * 2 / image.shape[-1]
    coarse = torch.randn(1, 2, 6, 6, generator=generator) * pixels
    offsets = rearrange(F.interpolate(coarse, size=image.shape[-2:], mode="bicubic"), "b c h w -> b h w c")
    identity = F.affine_grid(torch.eye(2, 3)[None], [1, 3, *image.shape[-2:]], align_corners=False)
    return F.grid_sample(image[None], identity + offsets, padding_mode="reflection", align_corners=False)[0]


DISTORTIONS: Final = (blur, noise, jpeg, shrink, blocks, recolour, warp)


class PerceptualTask(LaytonTask):
    """Distortion identification and word presence.

    Every image is damaged in a random way (or left whole); from pooled features of all stages three linear heads tell
    which way, how strongly, and, for Scenes, which of the 18 words of the caption (colours and shapes) apply.

    Args:
        net: The network to train.
        optimizer: Makes the optimizer.
        lr_scheduler: Makes the learning-rate schedule.
    """

    def __init__(
        self,
        net: PerceptualNet,
        *,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(optimizer=optimizer, lr_scheduler=lr_scheduler)
        self.net = net
        width = 2 * sum(net.widths)
        self.kind = nn.Linear(width, len(DISTORTIONS) + 1)
        self.strength = nn.Linear(width, 1)
        self.words = nn.Linear(width, len(WORDS))

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """Loss of one batch, ()."""
        return self._loss(batch, self.step_generator("distortion", device="cpu"))

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """Loss of one batch with distortions that depend on its position only, ()."""
        return self._loss(batch, torch.Generator().manual_seed(batch_idx))

    def export(self, folder: Path) -> None:
        """Write the network without its heads."""
        self.net.save_pretrained(folder)

    def _loss(self, batch: ImageBatch, generator: torch.Generator) -> Tensor:
        images, kinds, strengths = self._damage(batch["image"].cpu(), generator)
        images = images.to(self.device)
        pooled = torch.cat(
            [statistic for level in self.net(images) for statistic in (level.mean((2, 3)), level.amax((2, 3)))], dim=1
        )
        kinds, strengths = kinds.to(self.device), strengths.to(self.device)
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

    def _damage(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        kinds = torch.randint(len(DISTORTIONS) + 1, (len(images),), generator=generator)
        strengths = torch.rand(len(images), generator=generator)
        damaged = [
            image if kind == 0 else DISTORTIONS[int(kind) - 1](image, float(strength), generator)
            for image, kind, strength in zip(images, kinds, strengths, strict=True)
        ]
        return torch.stack(damaged), kinds, strengths


def word_targets(captions: list[str], keys: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """Which words each caption holds (B, 18), and which samples are English Scenes, so that it is known (B,)."""
    present = torch.tensor([[float(word in caption) for word in WORDS] for caption in captions], device=device)
    known = torch.tensor([float(seed_of_key(key) is not None) for key in keys], device=device)
    return present, known * (present.sum(1) > 0)
