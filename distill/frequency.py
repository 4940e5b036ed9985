"""Spatial frequencies of images: filters, band swaps, power spectra and edges, all differentiable.

Radii are shares of the Nyquist frequency along an axis: 0 is the mean, 1 the highest frequency of a row or column, and
the corners of the spectrum lie at sqrt(2). HiPA (arXiv 2311.18158) trains with the upper band and with edges; the
evidence of its frequency study are the band swaps.

Legend: B batch, C channels, H W pixels (or latent positions), K bins.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

HighPass = Literal["ideal", "gaussian"]


def radial_frequency(height: int, width: int, *, device: torch.device | None = None) -> Tensor:
    """Distance of every coefficient of ``rfft2`` from zero frequency, (H, W // 2 + 1) float32, in shares of Nyquist."""
    vertical = torch.fft.fftfreq(height, device=device)[:, None]
    horizontal = torch.fft.rfftfreq(width, device=device)[None, :]
    return 2.0 * (vertical**2 + horizontal**2).sqrt()


def low_pass_gain(height: int, width: int, radius: float, kind: HighPass, *, device: torch.device | None) -> Tensor:
    """Gain of the lower band in [0, 1], (H, W // 2 + 1): 1 up to ``radius`` (ideal), or ``exp(-f^2 / (2 radius^2))``.

    Raises:
        ValueError: ``radius`` is not positive, or an unknown kind.
    """
    if not radius > 0:
        raise ValueError(f"radius must be > 0, got {radius}")
    if kind not in get_args(HighPass):
        raise ValueError(f"kind must be one of {get_args(HighPass)}, got {kind!r}")
    frequency = radial_frequency(height, width, device=device)
    if kind == "ideal":
        return (frequency <= radius).float()
    return torch.exp(-0.5 * (frequency / radius) ** 2)


def low_pass(images: Tensor, radius: float, *, kind: HighPass = "gaussian") -> Tensor:
    """The lower band of images (B, C, H, W), same shape, at least float32.

    Args:
        images: Any range.
        radius: Cut-off (ideal) or standard deviation (Gaussian), in shares of Nyquist.
        kind: The filter.

    Raises:
        ValueError: See ``low_pass_gain``.
    """
    height, width = images.shape[-2:]
    gain = low_pass_gain(height, width, radius, kind, device=images.device)
    images = images.to(torch.promote_types(images.dtype, torch.float32))  # FFTs know no half precision on CPUs
    return torch.fft.irfft2(torch.fft.rfft2(images) * gain, s=(height, width))


def high_pass(images: Tensor, radius: float, *, kind: HighPass = "gaussian") -> Tensor:
    """What ``low_pass`` leaves out; arguments, shape and errors as there."""
    return images - low_pass(images, radius, kind=kind)


def swap_bands(low_from: Tensor, high_from: Tensor, radius: float, *, kind: HighPass = "ideal") -> Tensor:
    """Images with the lower band of one batch and the upper band of another, (B, C, H, W).

    Args:
        low_from: (B, C, H, W) gives the lower band.
        high_from: (B, C, H, W) gives the upper band.
        radius: Where the bands meet, in shares of Nyquist.
        kind: The filter; an ideal one shares no frequency between the two.

    Raises:
        ValueError: The shapes differ; see also ``low_pass_gain``.
    """
    if low_from.shape != high_from.shape:
        raise ValueError(f"images must have one shape, got {tuple(low_from.shape)} and {tuple(high_from.shape)}")
    return low_pass(low_from, radius, kind=kind) + high_pass(high_from, radius, kind=kind)


def radial_power_spectrum(images: Tensor, *, num_bins: int = 32) -> Tensor:
    """Power in rings of equal width from zero frequency to Nyquist, per sample, (B, K).

    The sum over bins is the mean square of the images (Parseval) without their mean and without the corners beyond
    Nyquist; windows are not applied.

    Args:
        images: (B, C, H, W); channels are averaged.
        num_bins: K.

    Raises:
        ValueError: ``num_bins`` is below 1.
    """
    if num_bins < 1:
        raise ValueError(f"num_bins must be >= 1, got {num_bins}")
    height, width = images.shape[-2:]
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    power = torch.fft.rfft2(images, norm="forward").abs().square().mean(dim=1)  # (B, H, W // 2 + 1)
    twice = torch.full((width // 2 + 1,), 2.0, dtype=power.dtype, device=power.device)
    twice[0] = 1.0  # columns that stand for themselves; all others stand for their mirror image too
    if width % 2 == 0:
        twice[-1] = 1.0
    frequency = radial_frequency(height, width, device=images.device)
    inside = (frequency > 0) & (frequency <= 1.0)
    ring = (frequency * num_bins).ceil().long().clamp(1, num_bins) - 1
    weight = F.one_hot(ring, num_bins).to(power.dtype) * (inside * twice)[..., None]
    return torch.einsum("bhw,hwk->bk", power, weight)


def sobel(images: Tensor) -> Tensor:
    """Derivatives of images by the horizontal and the vertical Sobel kernel, scaled to one unit per pixel.

    Borders are replicated, so that the edge of the picture is no edge.

    Args:
        images: (B, C, H, W).

    Returns:
        (B, 2 C, H, W), at least float32: every channel's derivative along the width, then along the height.
    """
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    along_width = images.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8.0
    kernels = torch.stack([along_width, along_width.T])[:, None]  # (2, 1, 3, 3)
    flat = rearrange(images, "b c h w -> (b c) 1 h w")
    with torch.autocast(images.device.type, enabled=False):  # differences of nearly equal values
        edges = F.conv2d(F.pad(flat, (1, 1, 1, 1), mode="replicate"), kernels)
    joined: Tensor = rearrange(edges, "(b c) k h w -> b (k c) h w", c=images.shape[1])
    return joined


def edge_strength(images: Tensor) -> Tensor:
    """Length of the Sobel gradient, (B, C, H, W); smooth at zero."""
    along_width, along_height = sobel(images).chunk(2, dim=1)
    return (along_width.square() + along_height.square() + math.ulp(1.0)).sqrt()
