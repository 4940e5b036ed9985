"""A small image-caption matcher: the differentiable scorer of preference learning in the embedded world.

It stands where the paper has MPS (a CLIP trained on human choices), which the network is needed for. It knows Scenes:
trained with captions that are wrong in exactly one thing, it reacts to counts, colours, shapes and relations. What it
cannot do is judge beauty. Texts come as the embeddings that the diffusion model itself is conditioned on
(``Condition.embeds``), so a batch of distillation can be scored as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from distill.condition import Condition
from layton.folder import JsonValue, load_pretrained, save_pretrained

MAX_SCALE = 100.0
FINAL_SIDE = 4


class ImageTower(nn.Module):
    """Images or latents to unit vectors. Places are kept to the end, because captions tell where things are.

    Args:
        in_channels: 3 for images, C for latents.
        size: Side that inputs are brought to by averaging; a power of two times 4.
        widths: Channels of the stages; ``log2(size / 4)`` stages halve the resolution, the first others keep it.
        dim: Length of the vectors.

    Raises:
        ValueError: ``size`` is not 4 times a power of two, or there are too few stages to get down to 4.
    """

    def __init__(self, in_channels: int, size: int, widths: Sequence[int], dim: int) -> None:
        super().__init__()
        halvings = round(math.log2(max(1, size / FINAL_SIDE)))
        if FINAL_SIDE * 2**halvings != size or halvings > len(widths):
            raise ValueError(f"size must be 4 * 2^k with k <= {len(widths)} stages, got {size}")
        self.size = size
        layers: list[nn.Module] = []
        before = in_channels
        for number, width in enumerate(widths):
            stride = 2 if number >= len(widths) - halvings else 1
            layers += [nn.Conv2d(before, width, 3, stride=stride, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
            before = width
        self.stages = nn.Sequential(*layers)
        self.head = nn.Sequential(
            nn.Linear(before * FINAL_SIDE**2, 4 * dim), nn.SiLU(), nn.LayerNorm(4 * dim), nn.Linear(4 * dim, dim)
        )

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W), images in [-1, 1] or latents of unit variance -> (B, dim) of unit length."""
        if images.shape[-1] != self.size or images.shape[-2] != self.size:
            images = F.interpolate(images, size=(self.size, self.size), mode="area")
        features = self.stages(images)
        return F.normalize(self.head(rearrange(features, "b c h w -> b (c h w)")).float(), dim=1)


class TextTower(nn.Module):
    """Text embeddings to unit vectors: two transformer layers and a mean over the positions.

    Args:
        text_width: D of the embeddings.
        length: Largest L.
        width: Width of the layers.
        depth: Their number.
        dim: Length of the vectors.
    """

    def __init__(self, text_width: int, length: int, width: int, depth: int, dim: int) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.LayerNorm(text_width), nn.Linear(text_width, width))
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(
            width, max(1, width // 32), 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim))

    def forward(self, embeds: Tensor, mask: Tensor | None = None) -> Tensor:
        """Embeddings (B, L, D), mask (B, L) true where a position is real -> (B, dim) of unit length.

        Raises:
            ValueError: Longer texts than the tower knows.
        """
        length = embeds.shape[1]
        if length > len(self.positions):
            raise ValueError(f"the matcher was made for texts of {len(self.positions)} positions, got {length}")
        x = self.project(embeds) + self.positions[:length]
        real = None if mask is None else mask.bool()
        x = self.layers(x, src_key_padding_mask=None if real is None else ~real)
        if real is not None:
            weight = real.to(x) / real.sum(1, keepdim=True).clamp(min=1)
            x = x * rearrange(weight, "b l -> b l 1") * length
        return F.normalize(self.head(reduce(x, "b l d -> b d", "mean")).float(), dim=1)


class Matcher(nn.Module):
    """Two towers and a temperature (CLIP, arXiv 2103.00020).

    Args:
        in_channels: 3 for images, C for latents.
        size: Side that images are brought to (64), or the latents' own (16).
        widths: Channels of the image tower.
        text_width: D of the text embeddings.
        text_length: Largest number of positions.
        text_depth: Layers of the text tower.
        dim: Length of the joint vectors, and width of the text tower.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        size: int = 64,
        widths: Sequence[int] = (32, 64, 96, 128),
        text_width: int = 192,
        text_length: int = 32,
        text_depth: int = 2,
        dim: int = 128,
    ) -> None:
        super().__init__()
        self.config: dict[str, JsonValue] = {
            "in_channels": in_channels,
            "size": size,
            "widths": [*widths],
            "text_width": text_width,
            "text_length": text_length,
            "text_depth": text_depth,
            "dim": dim,
        }
        self.image_tower = ImageTower(in_channels, size, widths, dim)
        self.text_tower = TextTower(text_width, text_length, dim, text_depth, dim)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @property
    def scale(self) -> Tensor:
        """Factor on the cosines, (), at most 100."""
        return self.log_scale.exp().clamp(max=MAX_SCALE)

    def forward(self, images: Tensor, condition: Condition) -> Tensor:
        """Scores (B,): scaled cosines of images (B, C, H, W) and their captions.

        Raises:
            ValueError: The condition holds no text embeddings.
        """
        return self.scale * (self.image_tower(images) * self.encode_text(condition)).sum(1)

    def encode_text(self, condition: Condition) -> Tensor:
        """Unit vectors (B, dim) of captions.

        Raises:
            ValueError: The condition holds no text embeddings.
        """
        if condition.embeds is None:
            raise ValueError("the matcher reads text embeddings, and the condition has none")
        found: Tensor = self.text_tower(condition.embeds, condition.mask)
        return found

    def save_pretrained(self, folder: Path | str, *, dtype: torch.dtype | None = None) -> None:
        """Write config and weights into ``folder``."""
        save_pretrained(self, self.config, folder, dtype=dtype)

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> Matcher:
        """Read what `save_pretrained` wrote.

        Raises:
            ValueError: The folder does not hold a matcher, or its weights do not fit.
        """
        return load_pretrained(cls, folder)


class MatcherScorer:
    """A frozen matcher as `distill.methods.preference.Scorer`.

    Args:
        matcher: Of latents, or of images together with a decoder; frozen in place. A folder is read.
        decode: Latents (B, C, h, w) to images (B, 3, H, W) in [-1, 1], with gradients; None and no ``autoencoder``
            scores the latents themselves, which costs far less.
        autoencoder: Folder of the AutoencoderKL that decodes; in place of ``decode`` in run files.

    Raises:
        ValueError: A folder does not hold what it should, or both kinds of decoder are given.
    """

    def __init__(
        self,
        matcher: Matcher | str,
        decode: Callable[[Tensor], Tensor] | None = None,
        *,
        autoencoder: str | None = None,
    ) -> None:
        if decode is not None and autoencoder is not None:
            raise ValueError("give decode or autoencoder, not both")
        found = Matcher.from_pretrained(matcher) if isinstance(matcher, str) else matcher
        self.matcher = found.eval().requires_grad_(False)
        self.decode = decode
        self._decoder: nn.Module | None = None
        if autoencoder is not None:
            from layton.ldm.autoencoder import Autoencoder

            loaded = Autoencoder.from_pretrained(autoencoder).eval().requires_grad_(False)
            self._decoder, self.decode = loaded, loaded.decode

    def score(self, x_0: Tensor, condition: Condition) -> Tensor:
        """Scores (B,); see `distill.methods.preference.Scorer`."""
        matcher = self.matcher.to(x_0.device)
        if self._decoder is not None:
            self._decoder.to(x_0.device)
        scores: Tensor = matcher(x_0 if self.decode is None else self.decode(x_0), condition)
        return scores
