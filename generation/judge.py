"""Whether an image's tokens show what a caption says: picks the best of several drawn images.

A generator cannot tell: the likelihood of what it drew says how common an image is, not whether a star is missing. The
picture of a judge is read once and asked about any number of captions; nothing is decoded.

Legend: B images, d code width, h x w token grid, L caption tokens, D text width, W width, T = (h / 2) (w / 2).
"""

from __future__ import annotations

from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from layton.folder import JsonValue, load_pretrained, save_pretrained


class Judge(nn.Module):
    """A transformer over a quarter as many tokens, and one over the caption that looks at it.

    Args:
        code_dim: d.
        grid: h = w, even.
        text_width: D.
        text_length: Largest L.
        width: W.
        image_depth: Layers of the image's transformer.
        caption_depth: Layers of the caption's.
        num_heads: Of both.

    Raises:
        ValueError: If the grid is odd.
    """

    def __init__(
        self,
        *,
        code_dim: int = 8,
        grid: int = 16,
        text_width: int = 192,
        text_length: int = 32,
        width: int = 128,
        image_depth: int = 3,
        caption_depth: int = 2,
        num_heads: int = 4,
    ) -> None:
        super().__init__()
        if grid % 2:
            raise ValueError(f"the grid must be even, got {grid}")
        self.config: dict[str, JsonValue] = {
            "code_dim": code_dim,
            "grid": grid,
            "text_width": text_width,
            "text_length": text_length,
            "width": width,
            "image_depth": image_depth,
            "caption_depth": caption_depth,
            "num_heads": num_heads,
        }
        self.width = width
        self.stem = nn.Sequential(
            nn.Conv2d(code_dim, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, width, 3, stride=2, padding=1)
        )
        self.places = nn.Parameter(0.02 * torch.randn(width, grid // 2, grid // 2))
        self.words = nn.Sequential(nn.LayerNorm(text_width), nn.Linear(text_width, width))
        self.order = nn.Parameter(0.02 * torch.randn(text_length, width))
        kind = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        self.look = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(width, num_heads, 4 * width, **kind),  # type: ignore[arg-type]
            image_depth,
            norm=nn.LayerNorm(width),
            enable_nested_tensor=False,
        )
        self.compare = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(width, num_heads, 4 * width, **kind),  # type: ignore[arg-type]
            caption_depth,
            norm=nn.LayerNorm(width),
        )
        self.verdict = nn.Linear(width, 1)

    def see(self, embeddings: Tensor) -> Tensor:
        """Code embeddings (B, d, h, w) to what is seen, (B, T, W)."""
        seen: Tensor = self.look(rearrange(self.stem(embeddings) + self.places, "b c h w -> b (h w) c"))
        return seen

    def compare_with(self, seen: Tensor, features: Tensor, mask: Tensor) -> Tensor:
        """Log odds (B,) that captions hold.

        Args:
            seen: (B, T, W), of `see`.
            features: (B, L, D) of the generator's text encoder, padded on the left.
            mask: (B, L), true for real caption tokens.

        Raises:
            ValueError: If captions are longer than the judge was made for.
        """
        length = features.shape[1]
        if length > len(self.order):
            raise ValueError(f"the judge reads captions of {len(self.order)} tokens, got {length}")
        real = mask.bool()
        place = (real.cumsum(1) - 1).clamp_min(0)  # counted from the first word, however much padding there is
        words = self.words(features) + self.order[place]
        found = self.compare(words, seen, tgt_key_padding_mask=~real)
        share = real.to(found) / real.sum(1, keepdim=True).clamp_min(1)
        return self.verdict((found * share[..., None]).sum(1)).squeeze(1).float()

    def forward(self, embeddings: Tensor, features: Tensor, mask: Tensor) -> Tensor:
        """Log odds (B,) that captions hold of images; see `see` and `compare_with`."""
        return self.compare_with(self.see(embeddings), features, mask)

    def save_pretrained(self, folder: Path | str, *, dtype: torch.dtype | None = None) -> None:
        """Write config and weights into ``folder``."""
        save_pretrained(self, self.config, folder, dtype=dtype)

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> Judge:
        """Read what `save_pretrained` wrote.

        Raises:
            ValueError: The folder does not hold a judge, or its weights do not fit.
        """
        return load_pretrained(cls, folder)
