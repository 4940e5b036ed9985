"""Image transforms whose chance is a function of a number: the same (seed, epoch, index) gives the same crop.

They wrap torchvision's v2 transforms, which draw from torch's global generator; that generator is set for the call and
restored after it, so a transform neither depends on nor disturbs the randomness of training.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from layton.data.images import DEFAULT_LIMITS, FitPolicy, ImageError, fit_image, to_tensor

_BICUBIC = v2.InterpolationMode.BICUBIC


class SampleTransform(ABC):
    """An "RGB" image of any size becomes a tensor (3, size, size) in [-1, 1]."""

    size: int
    flip: float = 0.0  # how often it mirrors

    def settings(self) -> str:
        """See `layton.data.sources.ImageSource.settings`."""
        return f"flip {self.flip:g}" if self.flip else ""

    @abstractmethod
    def __call__(self, image: Image.Image, *, seed: int) -> Tensor:
        """Transform one image.

        Args:
            image: Decoded image of mode "RGB".
            seed: Decides every random choice; in [0, 2^63).

        Returns:
            (3, size, size) float32 in [-1, 1].
        """


class Fit(SampleTransform):
    """No chance: fit to a square as `layton.data.images.fit_image` does. For evaluation and encoding.

    Args:
        size: Side in pixels.
        policy: "crop" (centre), "pad" or "resize".
    """

    def __init__(self, size: int = 256, *, policy: FitPolicy = "crop") -> None:
        self.size = _checked(size)
        self.policy: FitPolicy = policy

    def __call__(self, image: Image.Image, *, seed: int) -> Tensor:
        """Transform one image; see `SampleTransform`."""
        return to_tensor(fit_image(image, self.size, policy=self.policy)[0])


class RandomResizedCrop(SampleTransform):
    """A random part of the image, scaled to a square, and mirrored or not.

    Args:
        size: Side in pixels.
        scale: Range of the share of the area that is kept.
        ratio: Range of the aspect ratio of the part, before it is made square.
        flip: Probability of mirroring left and right. Use 0 where captions speak of left and right.
    """

    def __init__(
        self,
        size: int = 256,
        *,
        scale: tuple[float, float] = (0.8, 1.0),
        ratio: tuple[float, float] = (0.75, 4 / 3),
        flip: float = 0.5,
    ) -> None:
        self.size = _checked(size)
        crop = v2.RandomResizedCrop(size, scale=scale, ratio=ratio, interpolation=_BICUBIC, antialias=True)
        self.flip = flip
        self._transform = v2.Compose([crop, v2.RandomHorizontalFlip(flip)])

    def __call__(self, image: Image.Image, *, seed: int) -> Tensor:
        """Transform one image; see `SampleTransform`."""
        return to_tensor(_seeded(self._transform, image, seed))


class RandomCrop(SampleTransform):
    """A random square cut out at the image's own scale (small images are enlarged first), mirrored or not.

    What convolutional autoencoders are trained on: 128-pixel cuts cost a quarter of whole 256-pixel images.

    Args:
        size: Side in pixels.
        shorter_side: If given, the image is first scaled to this shorter side.
        flip: Probability of mirroring left and right. Use 0 where captions speak of left and right.
    """

    def __init__(self, size: int = 128, *, shorter_side: int | None = None, flip: float = 0.5) -> None:
        self.size = _checked(size)
        if shorter_side is not None and shorter_side < size:
            raise ValueError(f"shorter_side must be at least the crop's size {size}, got {shorter_side}")
        self.shorter_side = shorter_side
        self.flip = flip
        self._transform = v2.Compose([v2.RandomCrop(size), v2.RandomHorizontalFlip(flip)])

    def __call__(self, image: Image.Image, *, seed: int) -> Tensor:
        """Transform one image; see `SampleTransform`.

        Raises:
            ImageError: It is so narrow that it would have to be enlarged to more than an image may have.
        """
        shorter = min(image.size)
        target = self.shorter_side or max(shorter, self.size)
        if target != shorter:
            width, height = (max(self.size, round(side * target / shorter)) for side in image.size)
            _check_enlarged(width, height)
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        return to_tensor(_seeded(self._transform, image, seed))


def _seeded(transform: Any, image: Image.Image, seed: int) -> Image.Image:
    """Run a torchvision transform with torch's CPU generator at `seed`, and put that generator back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        transformed: Image.Image = transform(image)
    return transformed


def _check_enlarged(width: int, height: int) -> None:
    """A line of pixels would become a bomb."""
    try:
        DEFAULT_LIMITS.check_size(width=width, height=height)
    except ValueError as error:
        raise ImageError(f"it would have to be enlarged to {error}") from error


def _checked(size: int) -> int:
    if size < 1:
        raise ValueError(f"size must be >= 1, got {size}")
    return size
