"""Pixel measures per image: PSNR and SSIM, with the range of the data stated and never guessed.

Images of this library live in [-1, 1], so the data range is **2.0**. The reconstruction script of LlamaGen passes
``data_range=2.0`` for images in [0, 1]; that doubles the range, makes SSIM's stabilising constants four times too large
and so inflates the score. SSIM here is the original one (Wang et al. 2004): Gaussian window of 11 pixels with
sigma 1.5, K1 = 0.01, K2 = 0.03, per colour channel, then averaged; it is *not* scikit-image's default (uniform 7x7).
"""

from __future__ import annotations

import torch
from einops import reduce
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from layton.data.values import LOOSE, require_values

DATA_RANGE = 2.0
"""Range of images in [-1, 1]."""
PSNR_CAP = 100.0
"""What an evaluation counts for an image equal to its original, in dB: an infinite mean would say nothing."""
SSIM_WINDOW = 11
SSIM_SIGMA = 1.5


def round_to_uint8(images: Tensor) -> Tensor:
    """Clamps to [-1, 1] and rounds to the 256 levels that an image file can hold, as float32 in [-1, 1].

    Every figure is taken on images rounded so, since a PNG is what a user gets.

    Args:
        images: (B, 3, H, W) or any other shape, nominally in [-1, 1].

    Returns:
        The same shape; values in {-1, -1 + 2/255, ..., 1}.
    """
    levels = torch.round((images.float().clamp(-1, 1) + 1) * 127.5)
    return levels / 127.5 - 1


def check_pair(images: Tensor, originals: Tensor, *, min_side: int = 1) -> None:
    """Checks that two batches are RGB images of one shape, and the originals in [-1, 1].

    Raises:
        ValueError: Shapes differ, are not (B, 3, H, W), or a side is shorter than ``min_side``; or there are no floats,
            or originals beyond [-1, 1].
    """
    if images.shape != originals.shape:
        raise ValueError(f"images {tuple(images.shape)} and originals {tuple(originals.shape)} differ in shape")
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"expected images (B, 3, H, W), got {tuple(images.shape)}")
    if min(images.shape[-2:]) < min_side:
        raise ValueError(f"images must be at least {min_side} pixels on each side, got {tuple(images.shape[-2:])}")
    if not images.is_floating_point():
        raise ValueError(f"images must be floats in [-1, 1], got {images.dtype}")
    if len(originals):
        require_values(originals, what="originals", slack=LOOSE)


def psnr(images: Tensor, originals: Tensor, *, data_range: float = DATA_RANGE) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB: 10 log10(data_range^2 / MSE).

    Args:
        images: (B, 3, H, W) in [-1, 1].
        originals: (B, 3, H, W) in [-1, 1].
        data_range: Largest minus smallest possible value.

    Returns:
        (B,) dB; infinite where an image equals its original.

    Raises:
        ValueError: The shapes are not equal or not (B, 3, H, W).
    """
    check_pair(images, originals)
    return peak_signal_noise_ratio(
        images.float(), originals.float(), data_range=data_range, reduction="none", dim=(1, 2, 3)
    )


def mean_squared_error(images: Tensor, originals: Tensor) -> Tensor:
    """Mean squared error of each image.

    Args:
        images: (B, 3, H, W) in [-1, 1].
        originals: (B, 3, H, W) in [-1, 1].

    Returns:
        (B,) in [0, 4].

    Raises:
        ValueError: The shapes are not equal or not (B, 3, H, W).
    """
    check_pair(images, originals)
    return reduce((images.float() - originals.float()).square(), "b c h w -> b", "mean")


def ssim(images: Tensor, originals: Tensor, *, data_range: float = DATA_RANGE) -> Tensor:
    """Structural similarity of each image (Wang et al. 2004), 11-pixel Gaussian window, mean over channels.

    Args:
        images: (B, 3, H, W) in [-1, 1], at least 11 pixels on each side.
        originals: (B, 3, H, W) in [-1, 1].
        data_range: Largest minus smallest possible value.

    Returns:
        (B,) in [-1, 1]; 1 where an image equals its original.

    Raises:
        ValueError: The shapes are not equal, not (B, 3, H, W), or smaller than the window.
    """
    check_pair(images, originals, min_side=SSIM_WINDOW)
    result: Tensor = structural_similarity_index_measure(
        # channels last: the window's grouped convolution takes half the time on a CPU
        images.float().contiguous(memory_format=torch.channels_last),
        originals.float().contiguous(memory_format=torch.channels_last),
        gaussian_kernel=True,
        sigma=SSIM_SIGMA,
        kernel_size=SSIM_WINDOW,
        reduction="none",
        data_range=data_range,
    )  # type: ignore[assignment]  # a tuple only where maps are asked for
    return result.reshape(len(images))  # a batch of one comes back without its batch axis in some releases
