"""Image encoders: an image becomes one feature vector for each token position.

Two implementations share one border: `ViTEncoder` (here; the transformer encoder of arXiv 2503.08377) and
`layton.vqgan.VQGANEncoder` (the architecture of LlamaGen VQ-16, which the released checkpoint uses).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from layton.folder import JsonValue, load_pretrained, save_pretrained
from layton.modules import Transformer


class ImageEncoder(nn.Module, ABC):
    """Border of every encoder.

    Attributes:
        code_dim: d, the width of one feature vector.
        downsample_factor: Pixels per token along one side.
    """

    code_dim: int
    downsample_factor: int

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> features (B, d, H / f, W / f)."""

    @abstractmethod
    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write config and weights into ``folder``."""

    def check_size(self, images: Tensor) -> None:
        """Refuse images that do not divide into tokens.

        Raises:
            ValueError: If the shape is not (B, 3, H, W) with sides that are multiples of the factor.
        """
        factor = self.downsample_factor
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % factor or images.shape[3] % factor:
            raise ValueError(
                f"images must be (B, 3, H, W) with sides that are multiples of {factor}, got {tuple(images.shape)}"
            )


class ViTEncoder(ImageEncoder):
    """Transformer encoder: patchify in two steps, transform, one output vector for each patch.

    The patch is embedded in two strided steps with a non-linearity between (the hMLP stem of arXiv 2203.09795),
    which trains faster than one linear map and still never looks over a patch's edge.

    Args:
        code_dim: d.
        width: D.
        depth: Number of transformer blocks.
        num_heads: Attention heads.
        patch_size: Pixels per token along one side; a multiple of 8.
        stem_width: Channels between the two steps of the patch embedding.

    Raises:
        ValueError: If ``patch_size`` is not a multiple of 8.
    """

    def __init__(
        self,
        code_dim: int = 8,
        width: int = 256,
        depth: int = 5,
        num_heads: int = 4,
        patch_size: int = 16,
        stem_width: int = 96,
    ) -> None:
        super().__init__()
        if patch_size % 8:
            raise ValueError(f"patch_size must be a multiple of 8, got {patch_size}")
        self.code_dim = code_dim
        self.downsample_factor = patch_size
        self._config: dict[str, JsonValue] = {
            "code_dim": code_dim,
            "width": width,
            "depth": depth,
            "num_heads": num_heads,
            "patch_size": patch_size,
            "stem_width": stem_width,
        }
        self.stem = nn.Sequential(
            nn.Conv2d(3, stem_width, 8, stride=8),
            nn.GELU(approximate="tanh"),
            nn.Conv2d(stem_width, width, patch_size // 8, stride=patch_size // 8),
        )
        self.transformer = Transformer(width, depth, num_heads)
        self.head = nn.Conv2d(width, code_dim, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> features (B, d, h, w); not normalised.

        Raises:
            ValueError: If a side is not a multiple of ``patch_size``.
        """
        self.check_size(images)
        return self.head(self.transformer(self.stem(images)))

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
