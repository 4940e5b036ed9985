"""LlamaGen's pixel decoder (arXiv 2406.06525) as a code decoder of the tokenizer: one pass, no diffusion."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor

from layton.folder import JsonValue, load_pretrained, save_pretrained
from layton.interface import CodeDecoder, Generators
from layton.precision import dtype_of
from layton.vqgan import VQ16_MULTIPLIERS, VQGANDecoder


class VQGANCodeDecoder(CodeDecoder):
    """`layton.vqgan.VQGANDecoder` behind the border of code decoders; the defaults are VQ-16.

    Args:
        code_dim: d of the code embeddings.
        channels: Width of the last level.
        multipliers: Widths of the levels over ``channels``, finest level first.
        num_res_blocks: Residual blocks per level of the encoder; the decoder has one more.
        z_channels: Channels after ``post_quant_conv``.
        norm_groups: Groups of every GroupNorm.

    Raises:
        ValueError: A width does not divide into the normalisation groups.
    """

    needs_ldm: ClassVar[bool] = False
    steps = (1,)

    def __init__(
        self,
        *,
        code_dim: int = 8,
        channels: int = 128,
        multipliers: Sequence[int] = VQ16_MULTIPLIERS,
        num_res_blocks: int = 2,
        z_channels: int = 256,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        self.network = VQGANDecoder(
            code_dim=code_dim,
            channels=channels,
            multipliers=multipliers,
            num_res_blocks=num_res_blocks,
            z_channels=z_channels,
            norm_groups=norm_groups,
        )
        self._config: dict[str, JsonValue] = {
            "code_dim": code_dim,
            "channels": channels,
            "multipliers": list(multipliers),
            "num_res_blocks": num_res_blocks,
            "z_channels": z_channels,
            "norm_groups": norm_groups,
        }

    def decode(
        self,
        embeddings: Tensor,
        *,
        num_steps: int | None = None,
        conditioning_scale: float | None = None,
        generator: Generators | None = None,
    ) -> Tensor:
        """See `CodeDecoder.decode`; noise plays no part.

        Raises:
            ValueError: If a scale or more than one step is asked for.
        """
        self.check_steps(num_steps)
        if conditioning_scale is not None:
            raise ValueError(f"the vqgan decoder has no conditioning scale, got {conditioning_scale}")
        return self.network(embeddings.to(dtype_of(self.network))).float().clamp(-1, 1)

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write config and weights."""
        save_pretrained(self, self._config, folder, dtype=dtype)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, ldm: str | Path | None = None) -> Self:
        """Read what `save_pretrained` wrote; ``ldm`` is not needed.

        Raises:
            ValueError: If the folder holds something else.
        """
        return load_pretrained(cls, folder)
