"""Codes into the transformer and out of it: a full embedding and head, or both of low rank and tied.

Legend: B images, N tokens, V vocabulary, D width, d code dimension, r trained columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from generation.model.packing import packed_linear
from generation.model.shapes import Factors


class LinearHead(NamedTuple):
    """Logits before they are computed: ``features weight^T + bias``."""

    features: Tensor  # (..., c)
    weight: Tensor  # (V, c)
    bias: Tensor | None  # (V,)


class FullVocabulary(nn.Module):
    """An embedding (V, D) and an output layer (V, D) of their own.

    Args:
        vocab_size: V.
        width: D.
    """

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.head: nn.Module = nn.Linear(width, vocab_size, bias=False)

    def embed(self, codes: Tensor) -> Tensor:
        """Codes (...,) -> (..., D)."""
        return self.embedding(codes)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V) float32: guidance magnifies what a small type rounds away."""
        return self.head(hidden).float()

    def linear_head(self, hidden: Tensor) -> LinearHead:
        """What `logits` multiplies, for (..., D)."""
        return LinearHead(hidden, cast(Tensor, self.head.weight), None)

    def frozen_head(self) -> Callable[[Tensor], Tensor]:
        """`logits` for weights that do not change any more."""
        return self.head

    def zero_head(self) -> None:
        """Make all logits zero."""
        nn.init.zeros_(cast(Tensor, self.head.weight))


class FactoredVocabulary(nn.Module):
    """One table (V, d + r) for both ends: embed = A table[code], logits = table (B h) + bias.

    The first d columns are the tokenizer's codebook, so that codes that look alike start alike; the others are
    trained. The bias carries how frequent a code is, which the low rank need not then express.

    Args:
        vocab_size: V.
        width: D.
        factors: d and r.
    """

    def __init__(self, vocab_size: int, width: int, factors: Factors) -> None:
        super().__init__()
        columns = factors.code_dim + factors.rank
        self.factors = factors
        self.register_buffer("codebook", torch.zeros(vocab_size, factors.code_dim))
        self.codebook: Tensor
        self.columns = nn.Parameter(torch.empty(vocab_size, factors.rank))
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        self.into = nn.Linear(columns, width, bias=False)
        self.out_of = nn.Linear(width, columns, bias=False)
        nn.init.normal_(self.columns, std=max(1, columns) ** -0.5)

    def set_codebook(self, codebook: Tensor) -> None:
        """Take over the tokenizer's codebook (V, d); rows are brought to unit length.

        Raises:
            ValueError: If the shape is another.
        """
        if codebook.shape != self.codebook.shape:
            raise ValueError(f"the codebook must be {tuple(self.codebook.shape)}, got {tuple(codebook.shape)}")
        with torch.no_grad():
            self.codebook.copy_(F.normalize(codebook.float(), dim=-1))

    def table(self) -> Tensor:
        """All columns, (V, d + r)."""
        return torch.cat([self.codebook.to(self.columns.dtype), self.columns], dim=1)

    def embed(self, codes: Tensor) -> Tensor:
        """Codes (...,) -> (..., D)."""
        rows = torch.cat([self.codebook[codes].to(self.columns.dtype), self.columns[codes]], dim=-1)
        return self.into(rows)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V) float32: in half precision near codes would tie, and the product is a small one."""
        features, weight, bias = self.linear_head(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(features.float(), weight.float(), None if bias is None else bias.float())

    def linear_head(self, hidden: Tensor) -> LinearHead:
        """What `logits` multiplies, for (..., D)."""
        return LinearHead(self.out_of(hidden), self.table(), self.bias)

    def frozen_head(self) -> Callable[[Tensor], Tensor]:
        """`logits` for weights that do not change any more: the table is put together once."""
        with torch.device("meta"):
            head = nn.Linear(self.out_of.out_features, len(self.bias))
        head.weight = nn.Parameter(self.table().float(), requires_grad=False)
        head.bias = nn.Parameter(self.bias.float(), requires_grad=False)
        last = packed_linear(head)
        return lambda hidden: last(self.out_of(hidden).float())

    def zero_head(self) -> None:
        """Make all logits zero."""
        nn.init.zeros_(self.out_of.weight)
        nn.init.zeros_(self.bias)
