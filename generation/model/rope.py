"""Rotary positions of a caption followed by an image grid.

Legend: L caption length, N image tokens on a square grid, head_dim width of one attention head.

The image token that stands at row r and column c turns half of each head by r and half by c (LlamaGen,
arXiv 2406.06525, section 2.2). Caption tokens have no place on the grid. Two choices:

- ``"identity"``: they are not turned. What a caption token means does not depend on how many padding tokens stand
  before it, and their order is known from the text encoder's features.
- ``"zero"``: cosine and sine are both 0, as the released LlamaGen and LaCTokGen models were trained. Queries and keys
  of caption tokens become zero vectors, so that every query gives all caption tokens the same score, 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

CaptionRotary = Literal["identity", "zero"]


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """Factors of `rotate` for T positions, the same for all images or each image's own.

    Attributes:
        cos: (T, 1, head_dim) or (B, T, 1, head_dim) float32: the same for all heads.
        sin: As ``cos``, its first half negated.
    """

    cos: Tensor
    sin: Tensor

    def at(self, start: int, stop: int) -> Rotation:
        """The factors of positions start to stop - 1."""
        return Rotation(self.cos[..., start:stop, :, :], self.sin[..., start:stop, :, :])

    def pick(self, positions: Tensor) -> Rotation:
        """The factors of chosen positions (B, T) int64 of a table for all images."""
        return Rotation(self.cos[positions], self.sin[positions])


def rotation_table(
    caption_length: int,
    num_tokens: int,
    head_dim: int,
    *,
    base: float = 10000.0,
    caption: CaptionRotary = "identity",
    device: torch.device | str | None = None,
) -> Rotation:
    """Factors for L caption positions, then N grid positions in row-major order.

    Args:
        caption_length: L.
        num_tokens: N, a square number.
        head_dim: Width of one head; a multiple of 4.
        base: Wave-length base.
        caption: What happens at caption positions.
        device: Where the tables are made.

    Raises:
        ValueError: If ``num_tokens`` is no square or ``head_dim`` no multiple of 4.
    """
    side = math.isqrt(num_tokens)
    if side * side != num_tokens:
        raise ValueError(f"num_tokens must be a square number, got {num_tokens}")
    if head_dim % 4:
        raise ValueError(f"head_dim must be a multiple of 4, got {head_dim}")
    quarter = head_dim // 4
    frequencies = base ** (-torch.arange(quarter, dtype=torch.float32, device=device) / quarter)
    place = torch.arange(num_tokens, device=device)
    rows, columns = place // side, place % side
    angles = torch.cat([rows[:, None] * frequencies, columns[:, None] * frequencies], dim=1)
    cos, sin = angles.cos(), angles.sin()
    still = torch.full((caption_length, 2 * quarter), 1.0 if caption == "identity" else 0.0, device=device)
    cos = torch.cat([still, cos])
    sin = torch.cat([torch.zeros_like(still), sin])
    return Rotation(torch.cat([cos, cos], dim=1)[:, None], torch.cat([-sin, sin], dim=1)[:, None])


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn queries or keys (..., T, heads, head_dim); dtype is kept.

    Element i of a head's first half and element i of its second half are one plane.
    """
    return torch.addcmul(x * rotation.cos, x.roll(x.shape[-1] // 2, dims=-1), rotation.sin).to(x.dtype)
