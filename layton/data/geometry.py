"""Images of any size and shape to a square and back: the policy is recorded, and undone on decode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

FitPolicy = Literal["resize", "pad", "crop"]
FIT_POLICIES: tuple[FitPolicy, ...] = get_args(FitPolicy)
WHITE = (255, 255, 255)


@dataclass(frozen=True, slots=True)
class Geometry:
    """How one image was fitted to a square, with enough to undo it.

    Attributes:
        original_size: (height, width) of the image in pixels.
        size: Side of the square in pixels.
        policy: "resize" changes the aspect ratio, "pad" adds borders, "crop" keeps the central square.
        box: (left, top, right, bottom) in pixels. With "pad", where the image lies in the square; with "crop" and
            "resize", which part of the original fills the square.
    """

    original_size: tuple[int, int]
    size: int
    policy: FitPolicy
    box: tuple[int, int, int, int]

    def __post_init__(self) -> None:
        if self.policy not in FIT_POLICIES:
            raise ValueError(f"policy must be one of {', '.join(FIT_POLICIES)}, got {self.policy!r}")
        if self.size < 1 or min(self.original_size) < 1:
            raise ValueError(f"sizes must be >= 1, got original {self.original_size} and square {self.size}")
        left, top, right, bottom = self.box
        height, width = (self.size, self.size) if self.policy == "pad" else self.original_size
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise ValueError(f"box {self.box} does not lie within {width}x{height}")

    @classmethod
    def plan(cls, original_size: tuple[int, int], size: int, *, policy: FitPolicy = "crop") -> Geometry:
        """Work out the box for an image.

        Args:
            original_size: (height, width) of the image in pixels.
            size: Side of the square in pixels.
            policy: How the image becomes square.

        Raises:
            ValueError: If a size is below 1 or the policy is unknown.
        """
        height, width = original_size
        if min(height, width, size) < 1:
            raise ValueError(f"sizes must be >= 1, got original {original_size} and square {size}")
        if policy == "crop":
            side = min(height, width)
            left, top = (width - side) // 2, (height - side) // 2
            box = (left, top, left + side, top + side)
        elif policy == "pad":
            longer = max(height, width)
            inner_width, inner_height = max(1, round(width * size / longer)), max(1, round(height * size / longer))
            left, top = (size - inner_width) // 2, (size - inner_height) // 2
            box = (left, top, left + inner_width, top + inner_height)
        else:
            box = (0, 0, width, height)
        return cls((height, width), size, policy, box)

    def apply(self, image: Tensor, *, fill: float = 1.0) -> Tensor:
        """Fit a tensor to the square, bicubic with antialiasing.

        Args:
            image: (..., 3, H, W) in [-1, 1], of `original_size`.
            fill: Value of the borders that "pad" adds; 1 is white.

        Returns:
            (..., 3, size, size) in [-1, 1].

        Raises:
            ValueError: If the image has another size.
        """
        if tuple(image.shape[-2:]) != self.original_size:
            raise ValueError(f"image is {tuple(image.shape[-2:])}, this geometry is for {self.original_size}")
        left, top, right, bottom = self.box
        if self.policy == "pad":
            inner = resize_tensor(image, (bottom - top, right - left))
            square = inner.new_full((*inner.shape[:-2], self.size, self.size), fill)
            square[..., top:bottom, left:right] = inner
            return square
        return resize_tensor(image[..., top:bottom, left:right], (self.size, self.size))

    def undo(self, square: Tensor) -> Tensor:
        """Bring a decoded square back to the size and shape of the original.

        What "crop" cut away cannot be restored: its result has the size of the part that was kept.

        Args:
            square: (..., 3, S, S) in [-1, 1]; S may differ from `size` (a decoder may work at a larger scale).

        Returns:
            (..., 3, H, W), with "crop" the kept part (..., 3, side, side).

        Raises:
            ValueError: If the image is not square.
        """
        height, width = square.shape[-2:]
        if height != width:
            raise ValueError(f"undo needs a square image, got {height}x{width}")
        left, top, right, bottom = self.box
        if self.policy != "pad":
            return resize_tensor(square, (bottom - top, right - left))
        scale = width / self.size
        left, top = round(left * scale), round(top * scale)
        right, bottom = max(left + 1, round(right * scale)), max(top + 1, round(bottom * scale))
        return resize_tensor(square[..., top:bottom, left:right], self.original_size)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, for JSON beside the tokens."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Geometry:
        """Inverse of `to_dict`.

        Args:
            values: What `to_dict` gave, for instance after a trip through JSON.

        Raises:
            ValueError: If a field is missing, unknown or wrong.
        """
        if set(values) != {"original_size", "size", "policy", "box"}:
            raise ValueError(f"a geometry has original_size, size, policy and box; got {sorted(map(str, values))}")
        height, width = _integers(values["original_size"], 2)
        left, top, right, bottom = _integers(values["box"], 4)
        (size,) = _integers([values["size"]], 1)
        return cls((height, width), size, values["policy"], (left, top, right, bottom))


def fit_image(
    image: Image.Image,
    size: int,
    *,
    policy: FitPolicy = "crop",
    background: tuple[int, int, int] = WHITE,
) -> tuple[Image.Image, Geometry]:
    """Fit a decoded image to a square, bicubic with antialiasing.

    Args:
        image: "RGB" image of any size and shape.
        size: Side of the square in pixels.
        policy: "resize", "pad" or "crop".
        background: RGB colour of the borders that "pad" adds.

    Returns:
        The square image, and the geometry that undoes the fit.

    Raises:
        ValueError: If the size is below 1 or the policy is unknown.
    """
    geometry = Geometry.plan((image.height, image.width), size, policy=policy)
    left, top, right, bottom = geometry.box
    if policy == "pad":
        square = Image.new("RGB", (size, size), background)
        square.paste(image.resize((right - left, bottom - top), Image.Resampling.BICUBIC), (left, top))
        return square, geometry
    kept = image.crop(geometry.box) if policy == "crop" else image  # resize(box=...) would look beyond the box
    return kept.resize((size, size), Image.Resampling.BICUBIC), geometry


def resize_tensor(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic resize with antialiasing, clipped to [-1, 1] since bicubic overshoots.

    Args:
        image: (..., 3, H, W) in [-1, 1].
        size: (height, width) of the result.
    """
    if tuple(image.shape[-2:]) == size:
        return image.clone()
    flat = image.reshape(-1, *image.shape[-3:])
    resized = F.interpolate(flat, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(-1.0, 1.0)
    return resized.reshape(*image.shape[:-2], *size)


def _integers(values: Any, count: int) -> list[int]:
    """`count` integers, or a ValueError: the values come from a file."""
    if not isinstance(values, (list, tuple)) or len(values) != count:
        raise ValueError(f"expected {count} integers in a geometry, got {values!r}")
    if any(isinstance(value, bool) or not isinstance(value, int) for value in values):
        raise ValueError(f"expected {count} integers in a geometry, got {values!r}")
    return list(values)
