"""Settings of the released LaCTok tokenizer that its file does not hold.

The UNet and the autoencoder are those of Stable Diffusion XL base 1.0 (arXiv 2307.01952); the three time steps and the
condition scale are those of the released demo (repository Alpha-X-95/LaCToK, commit 845fb4a).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from layton.folder import JsonValue

RELEASED_TIMESTEPS = (999, 499, 124)
"""Indices 0, 4 and 7 of TLCM's grid ``linspace(999, 0, 9)``."""

RELEASED_CONDITION_SCALE = 0.8

RELEASED_LORA_ALPHA = 8.0
"""PEFT's default, left as it is by the official code whatever the rank (64): a scale of 0.125."""

SDXL_UNET: Mapping[str, JsonValue] = MappingProxyType(
    {
        "sample_size": 128,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [320, 640, 1280],
        "layers_per_block": 2,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
)

SDXL_VAE: Mapping[str, JsonValue] = MappingProxyType(
    {
        "sample_size": 1024,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "norm_num_groups": 32,
        "scaling_factor": 0.13025,
        "force_upcast": True,
    }
)

SDXL_SCHEDULER: Mapping[str, JsonValue] = MappingProxyType(
    {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
    }
)
