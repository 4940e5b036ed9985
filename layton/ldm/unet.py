"""The denoiser of the small latent diffusion model."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor


def build_unet(
    *,
    latent_channels: int = 16,
    latent_size: int = 16,
    block_out_channels: tuple[int, ...] = (96, 144),
    layers_per_block: int = 1,
    text_width: int = 192,
    num_heads: int = 2,
    norm_num_groups: int = 16,
) -> UNet2DConditionModel:
    """A Stable-Diffusion-shaped UNet of under 6M parameters for 16x16 latents.

    Args:
        latent_channels: C.
        latent_size: h = w of the latents that it is trained on.
        block_out_channels: Widths; each level but the last halves the grid.
        layers_per_block: Residual blocks in a down level (one more in an up level).
        text_width: D of the text embeddings.
        num_heads: Attention heads (diffusers calls the argument ``attention_head_dim``).
        norm_num_groups: Groups of the group norms.
    """
    levels = len(block_out_channels)
    return UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        block_out_channels=block_out_channels,
        layers_per_block=layers_per_block,
        cross_attention_dim=text_width,
        attention_head_dim=num_heads,
        norm_num_groups=norm_num_groups,
    )


class QuickAttention:
    """diffusers' plain attention on a CPU, where it trains two to three times as fast as the fused kernel; else that.

    It is chosen at each call: networks are made on the CPU and moved afterwards.
    """

    def __init__(self) -> None:
        self._plain, self._fused = AttnProcessor(), AttnProcessor2_0()

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """As diffusers' processors."""
        processor = self._plain if hidden_states.device.type == "cpu" else self._fused
        found: Tensor = processor(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        return found


def use_fast_attention(*models: torch.nn.Module) -> None:
    """Have diffusers models attend as is quickest where they are (`QuickAttention`)."""
    for model in models:
        model.set_attn_processor(QuickAttention())  # type: ignore[operator]
