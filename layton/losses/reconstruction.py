"""Pixel errors."""

from __future__ import annotations

import torch
from torch import Tensor


def psnr(images: Tensor, targets: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, (B,); both (B, 3, H, W) in [-1, 1], ``images`` clamped to it.

    For logging while training; reported figures come from `layton.metrics`, which rounds to 8 bits first.
    """
    error = (images.float().clamp(-1, 1) - targets.float()).square().mean(dim=(1, 2, 3)) / 4
    return -10 * torch.log10(error.clamp(min=1e-10))
