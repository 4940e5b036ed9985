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
from torch import Tensor

from layton.data.types import ImageBatch
from layton.losses.perceptual import PerceptualNet
from layton.tasks.base import LRSchedulerCallable, OptimizerCallable
from layton.tasks.distortion import DistortionTask, blurred, coarsened, rescaled, warped


def blur(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Gaussian blur of deviation up to 3 pixels."""
    return blurred(image, 0.4 + 2.6 * strength, radius=7)


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
    return coarsened(image, max(4, round(image.shape[-1] / (1.5 + 6.5 * strength))))


def blocks(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Each 8- or 16-pixel block mixed with its mean."""
    side = 8 if strength < 0.5 else 16
    means = F.avg_pool2d(image[None], side, ceil_mode=True)
    blocky = F.interpolate(means, scale_factor=float(side), mode="nearest")[0, :, : image.shape[1], : image.shape[2]]
    return torch.lerp(image, blocky, 0.2 + 0.8 * strength)


def recolour(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Contrast, brightness and channel gains changed."""
    return rescaled(image, 0.1 + 0.5 * strength, 0.05 + 0.3 * strength, 1, generator)


def warp(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """A smooth random displacement of up to 6 pixels."""
    return warped(image, 1 + 5 * strength, 6, generator)


DISTORTIONS: Final = (blur, noise, jpeg, shrink, blocks, recolour, warp)


class PerceptualTask(DistortionTask):
    """Distortion identification and word presence on images (`DistortionTask`).

    Args:
        net: The network to train.
        optimizer: Makes the optimizer.
        lr_scheduler: Makes the learning-rate schedule.
    """

    net: PerceptualNet

    def __init__(
        self,
        net: PerceptualNet,
        *,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(net, DISTORTIONS, optimizer=optimizer, lr_scheduler=lr_scheduler)

    def samples(self, batch: ImageBatch) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1]."""
        return batch["image"]

    def export(self, folder: Path) -> None:
        """Write the network without its heads."""
        self.net.save_pretrained(folder)
