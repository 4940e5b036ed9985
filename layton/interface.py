"""The two borders of the tokenizer.

`ImageTokenizer` is all that a generator knows of it, `CodeDecoder` all that it knows of the way from codes to pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from layton.folder import JsonValue

Generators = torch.Generator | Sequence[torch.Generator]


class ImageTokenizer(nn.Module, ABC):
    """Images to a fixed number of discrete codes and back.

    Attributes:
        vocab_size: V; codes lie in [0, V).
        num_tokens: N codes for an image.
        image_size: Side in pixels of the square images that are encoded.
    """

    vocab_size: int
    num_tokens: int
    image_size: int

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> codes (B, N) int64."""

    @abstractmethod
    def decode(
        self,
        codes: Tensor,
        *,
        decoder: str | None = None,
        num_steps: int | None = None,
        conditioning_scale: float | None = None,
        generator: Generators | None = None,
    ) -> Tensor:
        """Codes (B, N) int64 -> images (B, 3, H', W') in [-1, 1]."""


class CodeDecoder(nn.Module, ABC):
    """Code embeddings to pixels. Implementations are saved with the steps they were trained for.

    Attributes:
        steps: Step counts that can be asked for; None means any.
        default_steps: What is used when none is asked for.
        needs_ldm: Whether it decodes through a latent diffusion model, of which every decoder holds a copy: load those
            that you need (``decoders=[...]``).
        needs: Names of the decoders beside it whose files it builds on; none when its own files are all it needs.
    """

    needs_ldm: ClassVar[bool] = True
    steps: tuple[int, ...] | None = None
    default_steps: int = 1
    needs: tuple[str, ...] = ()

    @abstractmethod
    def decode(
        self,
        embeddings: Tensor,
        *,
        num_steps: int | None = None,
        conditioning_scale: float | None = None,
        generator: Generators | None = None,
    ) -> Tensor:
        """Code embeddings (B, d, h, w) -> images (B, 3, H, W) in [-1, 1].

        Args:
            embeddings: From `layton.quantizers.Quantizer.codes_to_embeddings`.
            num_steps: Network evaluations; the decoder's own number by default.
            conditioning_scale: Strength of the codes, where the decoder has such a thing.
            generator: Source of the noise, one for the batch or one for each image; seeded with 0 by default.

        Raises:
            ValueError: For a number of steps that the decoder was not trained for.
        """

    @property
    def default_scale(self) -> float | None:
        """Strength of the codes when none is asked for; None where the decoder has no such thing."""
        return None

    def sampling_record(self) -> dict[str, JsonValue]:
        """How it is sampled beside steps and scale, as it is saved and as evaluations record it."""
        return {}

    def require_beside(self, decoders: Mapping[str, CodeDecoder]) -> None:
        """Stop unless the decoders that this one builds on are there, with the weights that it learnt by.

        Args:
            decoders: All of the tokenizer's, by name.

        Raises:
            ValueError: One is missing, or has learnt something else since.
        """
        missing = next((needed for needed in self.needs if needed not in decoders), None)
        if missing is not None:
            raise ValueError(f"it builds on the decoder {missing!r}, which was not loaded")

    @abstractmethod
    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write config and weights; the latent diffusion model is not written."""

    def check_steps(self, num_steps: int | None) -> int:
        """The number of steps to take.

        Raises:
            ValueError: If it is not one that the decoder was trained for.
        """
        chosen = self.default_steps if num_steps is None else num_steps
        if self.steps is not None and chosen not in self.steps:
            known = ", ".join(map(str, self.steps))
            raise ValueError(f"this decoder was trained for {known} steps, not for {chosen}")
        if chosen < 1:
            raise ValueError(f"num_steps must be >= 1, got {chosen}")
        return chosen


def default_generators(batch: int) -> list[torch.Generator]:
    """One generator seeded with 0 for each image: the same picture for the same codes, in any batch."""
    return [torch.Generator().manual_seed(0) for _ in range(batch)]
