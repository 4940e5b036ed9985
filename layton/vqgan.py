"""The convolutional tokenizer of LlamaGen (arXiv 2406.06525, section 3.1), whose VQ-16 the released LaCTok uses.

Built from diffusers' autoencoder blocks: residual blocks at each level, attention after each of them at the lowest
level and in the middle, GroupNorm, then a 1x1 convolution to the code dimension. ``layton.convert`` maps the official
key names onto these modules.

Legend: B batch, H W pixels, h w code grid, d code dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self, cast

import torch
from diffusers.models.autoencoders.vae import Decoder, Encoder
from torch import Tensor, nn

from layton.encoder import ImageEncoder
from layton.folder import JsonValue, load_pretrained, save_pretrained

VQ16_MULTIPLIERS = (1, 1, 2, 2, 4)


def check_shape(channels: int, multipliers: Sequence[int], norm_groups: int) -> tuple[int, ...]:
    """Widths of the levels, finest first.

    Raises:
        ValueError: No level is given, or a width is not a multiple of the normalisation groups.
    """
    widths = tuple(channels * multiplier for multiplier in multipliers)
    if not widths or any(width < 1 or width % norm_groups for width in widths):
        raise ValueError(f"widths {widths} of the levels must be positive multiples of norm_groups {norm_groups}")
    return widths


class VQGANEncoder(ImageEncoder):
    """LlamaGen's encoder with its ``quant_conv``; the defaults are VQ-16 (f16, 256 channels to 8).

    Args:
        code_dim: d, channels after ``quant_conv``.
        channels: Width of the first level.
        multipliers: Widths of the levels over ``channels``; one level fewer halvings than entries. (1, 1, 2, 2, 4)
            is VQ-16, (1, 2, 2, 4) is VQ-8.
        num_res_blocks: Residual blocks per level.
        z_channels: Channels before ``quant_conv``.
        norm_groups: Groups of every GroupNorm.

    Raises:
        ValueError: A width does not divide into the normalisation groups.
    """

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
        widths = check_shape(channels, multipliers, norm_groups)
        self.code_dim = code_dim
        self.downsample_factor = 2 ** (len(widths) - 1)
        self.config: dict[str, JsonValue] = {
            "code_dim": code_dim,
            "channels": channels,
            "multipliers": list(multipliers),
            "num_res_blocks": num_res_blocks,
            "z_channels": z_channels,
            "norm_groups": norm_groups,
        }
        self.encoder = Encoder(
            in_channels=3,
            out_channels=z_channels,
            down_block_types=("DownEncoderBlock2D",) * (len(widths) - 1) + ("AttnDownEncoderBlock2D",),
            block_out_channels=widths,
            layers_per_block=num_res_blocks,
            norm_num_groups=norm_groups,
            double_z=False,
        )
        self.quant_conv = nn.Conv2d(z_channels, code_dim, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [-1, 1] to features (B, d, h, w), not normalised.

        Raises:
            ValueError: H or W is not a multiple of ``downsample_factor``.
        """
        self.check_size(images)
        return cast(Tensor, self.quant_conv(self.encoder(images)))

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write ``config.json`` and ``model.safetensors``, floating-point tensors as ``dtype`` if given."""
        save_pretrained(self, self.config, folder, dtype=dtype)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Load what ``save_pretrained`` wrote, in eval mode.

        Raises:
            ValueError: Files are missing or the weights do not fit.
        """
        return load_pretrained(cls, folder)


class VQGANDecoder(nn.Module):
    """LlamaGen's ``post_quant_conv`` and decoder: code embeddings straight to pixels, without diffusion.

    Args:
        code_dim: d of the code embeddings.
        channels: Width of the last level.
        multipliers: As in ``VQGANEncoder``, finest level first.
        num_res_blocks: Residual blocks per level of the encoder; the decoder has one more.
        z_channels: Channels after ``post_quant_conv``.
        norm_groups: Groups of every GroupNorm.

    Raises:
        ValueError: A width does not divide into the normalisation groups.
    """

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
        widths = check_shape(channels, multipliers, norm_groups)
        self.post_quant_conv = nn.Conv2d(code_dim, z_channels, 1)
        self.decoder = Decoder(
            in_channels=z_channels,
            out_channels=3,
            up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * (len(widths) - 1),
            block_out_channels=widths,
            layers_per_block=num_res_blocks,
            norm_num_groups=norm_groups,
        )

    def forward(self, embeddings: Tensor) -> Tensor:
        """Decode code embeddings (B, d, h, w) to images (B, 3, H, W), nominally in [-1, 1] (not clamped)."""
        return cast(Tensor, self.decoder(self.post_quant_conv(embeddings)))
