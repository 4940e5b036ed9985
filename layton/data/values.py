"""What the values of images may be: the whole library holds them as floats in [-1, 1]."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

LOOSE = 0.5  # by which bicubic resizing and networks' answers may go beyond


def require_values(images: Tensor, *, what: str = "images", slack: float = 0.01, stacklevel: int = 4) -> None:
    """Refuse images that are not floats in [-1, 1], and warn of some that seem to be in [0, 1].

    Args:
        images: Of any shape, not empty.
        what: They are called in the message.
        slack: How far beyond is no matter.
        stacklevel: Of the warning: the line that is shown is the caller's caller's.

    Raises:
        ValueError: With their type, or the range that they span.
    """
    if not images.is_floating_point():
        raise ValueError(f"{what} must be floats in [-1, 1], got {images.dtype}")
    low, high = (float(value) for value in images.detach().aminmax())
    if not -1 - slack <= low <= high <= 1 + slack:
        raise ValueError(f"{what} must lie in [-1, 1], got [{low:g}, {high:g}] (uint8 or [0, 1] images?)")
    if 0 <= low < 0.1 and high > 0.9 and not _is_of_bytes(images):  # as ToTensor's
        warnings.warn(
            f"{what} span [{low:.2f}, {high:.2f}]: they have to be in [-1, 1], not [0, 1]", stacklevel=stacklevel
        )


def _is_of_bytes(images: Tensor) -> bool:
    """Whether all values are those of bytes brought to [-1, 1], as of a bright picture."""
    values = (images.detach().float() + 1) * 127.5
    rounding = max(1e-3, 127.5 * torch.finfo(images.dtype).eps)
    return bool(((values - values.round()).abs() < rounding).all())
