"""Decoding a part of a latent: pixel losses through the VAE decoder at a fraction of the compute."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from layton.ldm.autoencoder import Autoencoder


@dataclass(frozen=True, slots=True)
class LatentCrop:
    """A square of a latent grid.

    Attributes:
        top: First row.
        left: First column.
        side: Rows and columns.
    """

    top: int
    left: int
    side: int

    @classmethod
    def draw(cls, size: tuple[int, int], side: int, generator: torch.Generator) -> LatentCrop:
        """A random square, everywhere in the grid with equal probability.

        Args:
            size: (h, w) of the grid.
            side: Side of the square.
            generator: Source of the place.

        Raises:
            ValueError: If the square does not fit.
        """
        if not 1 <= side <= min(size):
            raise ValueError(f"a crop of {side} latents does not fit into {size}")
        top, left = (
            int(torch.randint(length - side + 1, (), generator=generator, device=generator.device)) for length in size
        )
        return cls(top, left, side)

    def of(self, grid: Tensor, *, factor: int = 1) -> Tensor:
        """The square of a grid (B, C, h, w), or of an image with ``factor`` pixels for each latent."""
        top, left, side = self.top * factor, self.left * factor, self.side * factor
        return grid[..., top : top + side, left : left + side]

    def decode(self, autoencoder: Autoencoder, latents: Tensor, *, margin: int = 2) -> Tensor:
        """Pixels of the square, decoded with as much of the latents around it as the margin says.

        The decoder's convolutions reach further than any affordable margin and its group norms over all of what is
        decoded, so this is near to, not equal to, the square of the whole decoded picture. At the picture's own edges
        the window ends, as the decoder's padding does there.

        Args:
            autoencoder: The decoder.
            latents: (B, C, h, w) scaled.
            margin: Latents around the square that are decoded and thrown away.

        Returns:
            (B, 3, f * side, f * side), not clamped; f is the autoencoder's factor.

        Raises:
            ValueError: If the margin is negative.
        """
        if margin < 0:
            raise ValueError(f"the margin must be >= 0, got {margin}")
        top, left = max(0, self.top - margin), max(0, self.left - margin)
        bottom, right = self.top + self.side + margin, self.left + self.side + margin
        pixels = autoencoder.decode(latents[..., top:bottom, left:right])
        return LatentCrop(self.top - top, self.left - left, self.side).of(pixels, factor=autoencoder.downsample_factor)
