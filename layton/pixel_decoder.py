"""The light decoder of stage 0: code embeddings straight to pixels, in one pass and without diffusion."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from layton.folder import JsonValue, load_pretrained, save_pretrained, weights_hashes
from layton.modules import Transformer


class ConvBlock(nn.Module):
    """Residual pair of 3x3 convolutions with group norm.

    Args:
        channels: Width; a multiple of 8.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.conv_in = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_out = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x + self.conv_out(F.silu(self.conv_in(F.silu(self.norm(x)))))


class PixelDecoder(nn.Module):
    """Transformer on the token grid, convolutions on a grid four times as fine, pixels by depth-to-space.

    It gives stage 0 a gradient from pixels to codes at small cost; the convolutions let neighbouring patches agree
    on their common edge. It follows the symmetric decoder of ViT-VQGAN (arXiv 2110.04627).

    Args:
        code_dim: d.
        width: D.
        depth: Number of transformer blocks.
        num_heads: Attention heads.
        fine_width: Channels on the fine grid.
        num_fine_blocks: Convolution blocks on the fine grid.
        patch_size: Pixels per token along one side; a multiple of 4.
    """

    def __init__(
        self,
        code_dim: int = 8,
        width: int = 256,
        depth: int = 5,
        num_heads: int = 4,
        fine_width: int = 64,
        num_fine_blocks: int = 2,
        patch_size: int = 16,
    ) -> None:
        super().__init__()
        self.pixels = patch_size // 4
        self._config: dict[str, JsonValue] = {
            "code_dim": code_dim,
            "width": width,
            "depth": depth,
            "num_heads": num_heads,
            "fine_width": fine_width,
            "num_fine_blocks": num_fine_blocks,
            "patch_size": patch_size,
        }
        self.embed = nn.Conv2d(code_dim, width, 3, padding=1)
        self.transformer = Transformer(width, depth, num_heads)
        self.expand = nn.Conv2d(width, 16 * fine_width, 1)
        self.fine = nn.Sequential(*(ConvBlock(fine_width) for _ in range(num_fine_blocks)))
        self.head = nn.Conv2d(fine_width, 3 * self.pixels**2, 3, padding=1)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Code embeddings (B, d, h, w) -> images (B, 3, H, W), nominally in [-1, 1], not clamped."""
        coarse = self.transformer(self.embed(embeddings))
        fine = rearrange(self.expand(coarse), "b (c i j) h w -> b c (h i) (w j)", i=4, j=4)
        return rearrange(self.head(self.fine(fine)), "b (c i j) h w -> b c (h i) (w j)", i=self.pixels, j=self.pixels)

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write config and weights into ``folder``."""
        save_pretrained(self, self._config, folder, dtype=dtype)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read what `save_pretrained` wrote, in float32 and eval mode.

        Raises:
            ValueError: If the folder holds something else.
        """
        return load_pretrained(cls, folder)


def reader_fingerprints(decoder: PixelDecoder) -> tuple[str, ...]:
    """`CodeReader.fingerprints` of a decoder that stays as it is."""
    parts = ("embed.", "transformer.")
    return weights_hashes({name: value for name, value in decoder.state_dict().items() if name.startswith(parts)})


class CodeReader(nn.Module):
    """The frozen transformer of a trained pixel decoder, which has learnt what codes mean together.

    A latent decoder that is told what it makes of the codes need not find that out anew (`layton.ladd.LADD`).

    Args:
        decoder: Its first half is kept, and frozen in place.
    """

    def __init__(self, decoder: PixelDecoder) -> None:
        super().__init__()
        self.embed, self.transformer = decoder.embed, decoder.transformer
        self.code_dim, self.width = decoder.embed.in_channels, decoder.expand.in_channels
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, embeddings: Tensor) -> Tensor:
        """Code embeddings (B, d, h, w) -> features (B, width, h, w)."""
        features: Tensor = self.transformer(self.embed(embeddings))
        return features

    def fingerprints(self) -> tuple[str, ...]:
        """See `layton.folder.weights_hashes`: what has learnt by one reader cannot listen to another."""
        return weights_hashes(self.state_dict())

    def train(self, mode: bool = True) -> Self:
        """Nothing: it stays in eval mode."""
        return super().train(False)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read a `PixelDecoder`'s folder.

        Raises:
            ValueError: If the folder holds something else.
        """
        return cls(PixelDecoder.from_pretrained(folder))
