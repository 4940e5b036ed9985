"""Does a reconstruction keep its colours? Washed-out and over-exposed results can hide behind a fair PSNR."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange, reduce
from torch import Tensor

from layton.metrics.image import check_pair

_LEVELS = 127.5  # 8-bit levels for one unit of an image in [-1, 1]
# IEC 61966-2-1 (sRGB, D65) to CIE XYZ, divided by the white point: white becomes (1, 1, 1)
_SRGB_TO_XYZ = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041))


@dataclass(frozen=True, slots=True, eq=False)
class ColourErrors:
    """Colour errors of each image of a batch, reconstruction minus original.

    Attributes:
        mean: (B, 3) error of the mean of red, green, blue, in 8-bit levels; positive is brighter.
        std: (B, 3) error of the standard deviation within the image, in 8-bit levels; negative is washed out.
        delta_e: (B,) CIE 1976 colour difference of the two images' mean colours (averaged in linear light);
            about 2.3 is just noticeable.
    """

    mean: Tensor
    std: Tensor
    delta_e: Tensor


def colour_errors(images: Tensor, originals: Tensor) -> ColourErrors:
    """Errors of the channels' means and standard deviations, and of the mean colour.

    Args:
        images: (B, 3, H, W) sRGB in [-1, 1].
        originals: (B, 3, H, W) sRGB in [-1, 1].

    Returns:
        One row per image.

    Raises:
        ValueError: The shapes are not equal or not (B, 3, H, W).
    """
    check_pair(images, originals)
    a, b = (rearrange(x.float(), "b c h w -> b c (h w)") for x in (images, originals))
    return ColourErrors(
        mean=(a.mean(-1) - b.mean(-1)) * _LEVELS,
        std=(a.std(-1, correction=0) - b.std(-1, correction=0)) * _LEVELS,
        delta_e=(_mean_lab(images) - _mean_lab(originals)).square().sum(-1).sqrt(),
    )


def _mean_lab(images: Tensor) -> Tensor:
    """CIE L*a*b* of the mean colour in linear light: (B, 3, H, W) sRGB in [-1, 1] -> (B, 3)."""
    srgb = (images.float().clamp(-1, 1) + 1) / 2
    linear = torch.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    matrix = torch.tensor(_SRGB_TO_XYZ, dtype=torch.float32, device=images.device)
    xyz = reduce(linear, "b c h w -> b c", "mean") @ (matrix / matrix.sum(1, keepdim=True)).T
    cut = 6 / 29
    f_x, f_y, f_z = torch.where(xyz > cut**3, xyz.clamp(min=0).pow(1 / 3), xyz / (3 * cut**2) + 4 / 29).unbind(-1)
    return torch.stack([116 * f_y - 16, 500 * (f_x - f_y), 200 * (f_y - f_z)], dim=-1)
