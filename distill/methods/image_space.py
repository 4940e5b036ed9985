"""Where a student's latents are compared with a teacher's: in the latent itself, or as decoded images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from distill.held import Held

Distance = Callable[[Tensor, Tensor], Tensor]
"""Distance () of images or latents (B, C, H, W) from their targets; gradients flow into the first."""


class LatentDecoder(Protocol):
    """What turns latents into images, for instance ``layton.ldm.autoencoder.Autoencoder``."""

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) to images (B, 3, H, W), nominally in [-1, 1]."""
        ...


class ImageSpace(nn.Module):
    """Brings two batches of latents to where they are compared.

    Args:
        decoder: Has ``decode(latents) -> images``; None compares the latents themselves. Gradients pass through it.
        crop: Side, in latent positions, of one random square that is compared instead of the whole, the same for both
            and for the whole batch: decoding costs in proportion to its area. None compares everything.

    Raises:
        ValueError: ``decoder`` has no ``decode``, or ``crop`` is below 1.
    """

    def __init__(self, decoder: nn.Module | None = None, *, crop: int | None = None) -> None:
        super().__init__()
        if decoder is not None and not hasattr(decoder, "decode"):
            raise ValueError(f"a decoder needs a method decode(latents), {type(decoder).__name__} has none")
        if crop is not None and crop < 1:
            raise ValueError(f"crop must be >= 1, got {crop}")
        self.decoder = None if decoder is None else Held(decoder, frozen=True)
        self.crop = crop

    def forward(self, x_0: Tensor, target: Tensor, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Both as images (B, 3, H, W), or as latents without a decoder; the target without gradient.

        Args:
            x_0: (B, C, h, w) student's latents.
            target: (B, C, h, w) teacher's.
            generator: Places the crop.
        """
        if self.crop is not None:
            rows, columns = (self._span(length, generator) for length in x_0.shape[-2:])
            x_0, target = x_0[..., rows, columns], target[..., rows, columns]
        with torch.no_grad():
            wanted = self._decode(target)
        return self._decode(x_0), wanted

    def _decode(self, latents: Tensor) -> Tensor:
        if self.decoder is None:
            return latents
        return cast(LatentDecoder, self.decoder.on(latents.device)).decode(latents).float()

    def _span(self, length: int, generator: torch.Generator) -> slice:
        side = min(self.crop or length, length)
        start = int(torch.randint(length - side + 1, (), generator=generator, device=generator.device))
        return slice(start, start + side)
