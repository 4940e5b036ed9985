"""The transformer block of LaytonGen: Llama's, without biases (LlamaGen, arXiv 2406.06525, section 2.2).

Legend: R rows (images, or twice as many with guidance), T tokens of this call, S keys that are seen, D width,
K heads, hd = D / K.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from generation.model.rope import Rotation, rotate


class LayerCache(Protocol):
    """Keys and values of one layer for the tokens so far."""

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values (R, K, T, hd) of new tokens; returns those of all tokens (R, K, S, hd)."""


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """Softmax attention of queries (R, K, T, hd) over keys and values (R, K, S, hd).

    Args:
        query: Queries.
        key: Keys.
        value: Values.
        bias: Added to the scores, broadcasts to (R, K, T, S); None for nothing.

    Returns:
        (R, K, T, hd). While a CPU trains, two plain products: two to three times as fast there as the fused kernel,
        backward above all.
    """
    if query.device.type != "cpu" or not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias
    return scores.softmax(dim=-1).to(value.dtype) @ value


class Attention(nn.Module):
    """Self-attention with rotary positions.

    Args:
        width: D.
        num_heads: K; must divide D into multiples of 4.

    Raises:
        ValueError: If it does not.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        if width % num_heads or width // num_heads % 4:
            raise ValueError(f"width {width} must be a multiple of four times num_heads {num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(
        self, x: Tensor, rotation: Rotation, bias: Tensor | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        """(R, T, D) -> (R, T, D); ``bias`` as in `attend`; with a cache, older tokens are attended to as well."""
        rows, tokens, width = x.shape
        heads = self.qkv(x).view(rows, tokens, 3 * self.num_heads, -1)
        turning, value = heads.split((2 * self.num_heads, self.num_heads), dim=2)
        query, key = rotate(turning, rotation).transpose(1, 2).chunk(2, dim=1)  # both turned at once
        value = value.transpose(1, 2)
        if cache is not None:
            key, value = cache.append(key, value)
        mixed = attend(query, key, value, bias)
        return self.out(mixed.transpose(1, 2).reshape(rows, tokens, width))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), with gate and up in one product.

    Args:
        width: D.
        hidden: Width inside.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(R, T, D) -> (R, T, D)."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm block: attention, then SwiGLU.

    Args:
        width: D.
        num_heads: K.
        hidden: Width inside SwiGLU.

    Attributes:
        residual_dropout: Of what attention adds, while training.
        ffn_dropout: Of what SwiGLU adds.
    """

    def __init__(self, width: int, num_heads: int, hidden: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width, eps=1e-5)
        self.attention = Attention(width, num_heads)
        self.ffn_norm = nn.RMSNorm(width, eps=1e-5)
        self.ffn = FeedForward(width, hidden)
        self.residual_dropout = self.ffn_dropout = 0.0

    def forward(
        self, x: Tensor, rotation: Rotation, bias: Tensor | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        """(R, T, D) -> (R, T, D); arguments as in `Attention.forward`."""
        mixed = self.attention(self.attention_norm(x), rotation, bias, cache)
        if self.training:
            mixed = F.dropout(mixed, self.residual_dropout)
        x = x + mixed
        fed = self.ffn(self.ffn_norm(x))
        if self.training:
            fed = F.dropout(fed, self.ffn_dropout)
        return x + fed
