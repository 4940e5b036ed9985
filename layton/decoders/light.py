"""The decoder that stage 0 trains along with the codes."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor

from layton.folder import read_class, resolve_class
from layton.interface import CodeDecoder, Generators
from layton.pixel_decoder import PixelDecoder
from layton.precision import dtype_of


class LightDecoder(CodeDecoder):
    """Pixels in one pass, without a diffusion model: quick, and without any detail that codes do not hold.

    Args:
        network: The decoder that stage 0 trained.
    """

    __module__ = "layton.decoders"  # what files say
    needs_ldm: ClassVar[bool] = False
    steps = (1,)

    def __init__(self, network: PixelDecoder) -> None:
        super().__init__()
        self.network = network

    def decode(
        self,
        embeddings: Tensor,
        *,
        num_steps: int | None = None,
        conditioning_scale: float | None = None,
        generator: Generators | None = None,
    ) -> Tensor:
        """See `CodeDecoder.decode`; noise and scale play no part.

        Raises:
            ValueError: If a scale or more than one step is asked for.
        """
        self.check_steps(num_steps)
        if conditioning_scale is not None:
            raise ValueError(f"the light decoder has no conditioning scale, got {conditioning_scale}")
        return self.network(embeddings.to(dtype_of(self.network))).float().clamp(-1, 1)

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write the network."""
        self.network.save_pretrained(folder, dtype=dtype)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, ldm: str | Path | None = None) -> Self:
        """Read it; ``ldm`` is not needed."""
        return cls(resolve_class(read_class(folder), PixelDecoder).from_pretrained(folder))
