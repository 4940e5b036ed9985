"""Transformer parts shared by the token encoder and the light decoder, and the digest of any module's weights.

Legend: B batch, N tokens, D width, K heads, h w token grid.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def rope_2d(
    h: int, w: int, head_dim: int, *, base: float = 100.0, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of 2-D rotary positions: half of the head turns with the row, half with the column.

    Positions are relative, so that a model runs on grids that it was not trained on (196, 256, 324 tokens).
    The base is small because grids are small (arXiv 2403.13298, "RoPE-axial").

    Args:
        h: Rows of the token grid.
        w: Columns of the token grid.
        head_dim: Width of one head; a multiple of 4.
        base: Wave-length base.
        device: Where they are made.

    Returns:
        Two float32 tensors (h * w, head_dim // 2).

    Raises:
        ValueError: If ``head_dim`` is not a multiple of 4.
    """
    if head_dim % 4:
        raise ValueError(f"head_dim must be a multiple of 4, got {head_dim}")
    frequencies = base ** (-torch.arange(head_dim // 4, dtype=torch.float32, device=device) / (head_dim // 4))
    rows, columns = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
    angles = torch.cat(
        [rows.flatten()[:, None] * frequencies, columns.flatten()[:, None] * frequencies],
        dim=1,
    )
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn queries or keys (B, K, N, head_dim) by the angles (N, head_dim // 2); dtype is kept."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class SquaredReLU(nn.Module):
    """max(x, 0)^2 (Primer, arXiv 2109.08668): as good as GELU, and its backward is several times cheaper on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise, any shape."""
        return F.relu(x).square()


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention, all (B, K, N, head_dim).

    On a CPU the two plain products are two to three times as fast as the fused kernel at these lengths, forward and
    backward, in bfloat16 above all; elsewhere the fused kernel.
    """
    if query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    return scores.softmax(dim=-1).to(value.dtype) @ value


class Attention(nn.Module):
    """Self-attention with query-key normalisation and 2-D rotary positions.

    Args:
        width: D.
        num_heads: K; must divide D.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width {width} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.query_norm = nn.LayerNorm(width // num_heads, bias=False)
        self.key_norm = nn.LayerNorm(width // num_heads, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attend over all tokens: (B, N, D) -> (B, N, D); angles (N, head_dim // 2)."""
        query, key, value = rearrange(self.qkv(x), "b n (three k d) -> three b k n d", three=3, k=self.num_heads)
        query = rotate(self.query_norm(query), cos, sin).to(value.dtype)
        key = rotate(self.key_norm(key), cos, sin).to(value.dtype)
        return self.out(rearrange(attend(query, key, value), "b k n d -> b n (k d)"))


class Block(nn.Module):
    """Pre-norm transformer block: attention, then a squared-ReLU perceptron four times as wide.

    Args:
        width: D.
        num_heads: K.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.attention = Attention(width, num_heads)
        self.mlp_norm = nn.LayerNorm(width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), SquaredReLU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """A stack of blocks over a token grid, with a final norm.

    Args:
        width: D.
        depth: Number of blocks.
        num_heads: K.
    """

    def __init__(self, width: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.head_dim = width // num_heads
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, bias=False)
        self.apply(init_linear)
        for name, parameter in self.named_parameters():  # residual branches start small whatever the depth (GPT-2)
            if name.endswith(("attention.out.weight", "mlp.2.weight")):
                nn.init.normal_(parameter, std=0.02 / (2 * depth) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Token map to token map: (B, D, h, w) -> (B, D, h, w)."""
        h, w = x.shape[-2:]
        cos, sin = rope_2d(h, w, self.head_dim, device=x.device)
        tokens = rearrange(x, "b d h w -> b (h w) d")
        for block in self.blocks:
            tokens = block(tokens, cos, sin)
        return rearrange(self.norm(tokens), "b (h w) d -> b d h w", h=h)


def init_linear(module: nn.Module) -> None:
    """Truncated normal weights of deviation 0.02 and zero biases for linear layers."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def weights_digest(*modules: nn.Module) -> str:
    """16 hex digits over the weights of modules; the same on every device, and in half precision for equal values."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(name.encode())
            value = tensor.detach().cpu()
            digest.update((value.float() if value.is_floating_point() else value).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def require_weights(model: nn.Module, place: Path | str) -> None:
    """Refuse a model of which weights are missing: diffusers warns only, and leaves them without values.

    Raises:
        ValueError: With the first of them.
    """
    missing = [name for name, value in model.state_dict().items() if value.is_meta]
    if missing:
        raise ValueError(f"{place} lacks {len(missing)} weights, such as {missing[0]}")


def variant_of(folder: Path | str) -> str | None:
    """``fp16`` where a model's weights are stored as that variant alone, as downloads of large models often are."""
    names = [file.name for file in Path(folder).glob("*.safetensors")]
    return "fp16" if names and all(".fp16" in name for name in names) else None
