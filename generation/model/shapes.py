"""Sizes of LaytonGen: the published ones and small ones for a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from generation.model.rope import CaptionRotary


@dataclass(frozen=True, slots=True)
class CaptionShape:
    """What a caption prefix looks like.

    Attributes:
        dim: Width of the text encoder's features (2048 for flan-t5-xl).
        length: Most tokens of a caption.
        null: The caption that stands for "none" in classifier-free guidance: the fixed random one of LlamaGen, or one
            that is learned.
        rotary: What rotary positions do to caption tokens, see `generation.model.rope`.
    """

    dim: int = 2048
    length: int = 120
    null: Literal["fixed", "learned"] = "fixed"
    rotary: CaptionRotary = "identity"

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: If a value is out of range.
        """
        if self.dim < 1 or self.length < 1:
            raise ValueError(f"a caption needs positive dim and length, got {self.dim} and {self.length}")
        if self.null not in ("fixed", "learned"):
            raise ValueError(f"null must be fixed or learned, got {self.null!r}")
        if self.rotary not in ("identity", "zero"):
            raise ValueError(f"rotary must be identity or zero, got {self.rotary!r}")


@dataclass(frozen=True, slots=True)
class Factors:
    """Token embedding and output layer of low rank, tied through one table (V, code_dim + rank).

    A full embedding and a full head of 16,384 codes cost more than the whole of a small transformer.

    Attributes:
        code_dim: Columns that hold the tokenizer's codebook and are not trained; 0 for none.
        rank: Columns that are trained; 0 for none.
    """

    code_dim: int = 8
    rank: int = 24

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: If there are no columns.
        """
        if min(self.code_dim, self.rank) < 0 or self.code_dim + self.rank < 1:
            raise ValueError(f"factors need columns, got code_dim {self.code_dim} and rank {self.rank}")


@dataclass(frozen=True, slots=True)
class Dropout:
    """Probabilities of dropping elements while training; LlamaGen's are 0.1 each.

    Attributes:
        token: Of the embedded sequence, caption and codes.
        residual: Of what attention adds.
        ffn: Of what the feed-forward layer adds.
    """

    token: float = 0.1
    residual: float = 0.1
    ffn: float = 0.1

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: If a probability is outside [0, 1).
        """
        for value in (self.token, self.residual, self.ffn):
            if not 0.0 <= value < 1.0:
                raise ValueError(f"dropout must be in [0, 1), got {value}")


@dataclass(frozen=True, slots=True)
class Size:
    """Width and depth of a transformer.

    Attributes:
        depth: Number of blocks.
        num_heads: Attention heads.
        width: D.
        hidden: Width inside the feed-forward layers; None for LlamaGen's rule, see `swiglu_width`.
        factors: Low-rank tokens; None for a full embedding and a full head.
    """

    depth: int
    num_heads: int
    width: int
    hidden: int | None = None
    factors: Factors | None = None


SIZES: dict[str, Size] = {
    # ours, for a CPU
    "tiny": Size(2, 2, 32, 64, Factors(4, 4)),
    "mini": Size(8, 5, 320, 768, Factors(8, 24)),
    "small": Size(6, 8, 512),
    # LlamaGen's, arXiv 2406.06525 table 2 and repository
    "B": Size(12, 12, 768),
    "L": Size(24, 16, 1024),
    "XL": Size(36, 20, 1280),
    "XXL": Size(48, 24, 1536),
    "3B": Size(24, 32, 3200),
}
"""By name; with 16,384 codes about 10M (mini), 38M (small), 111M, 343M, 775M, 1.4B and 3.1B parameters."""


def swiglu_width(width: int, *, multiple: int = 256) -> int:
    """LlamaGen's width inside a SwiGLU layer: two thirds of 4 D, rounded up to a multiple."""
    return -(-int(2 * 4 * width / 3) // multiple) * multiple
