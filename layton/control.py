"""Parts of the control branch that steers a frozen UNet with image codes (see ``layton.ladd``).

Legend: B batch, d code dimension, h w grid.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, cast

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F

from distill.adapters import TLCM_LORA_TARGETS as TLCM_LORA_TARGETS  # passed on
from distill.adapters import LoraSettings as LoraSettings
from layton.folder import JsonValue, save_config, save_tensors
from layton.modules import require_weights, variant_of

Resize = Literal["nearest", "bilinear", "bicubic"]
PAPER_CHANNELS = (32, 96, 256)
HEARD = "controlnet.controlnet_cond_embedding.features."  # names of the weights by which features are heard


class CodeEmbedding(nn.Module):
    """Code embeddings to the width of the UNet's first level, at constant resolution.

    conv3x3 d -> d, then for each next width one pair (same -> same, same -> next), SiLU after each, then a zero
    convolution: ControlNet's conditioning embedding without its strides. Key names are those of the official code.

    Args:
        code_dim: d, channels of the code grid.
        out_channels: Width of the UNet's first level.
        hidden_channels: Widths after ``code_dim``; the paper's are (32, 96, 256).
    """

    def __init__(self, code_dim: int, out_channels: int, *, hidden_channels: Sequence[int] = PAPER_CHANNELS) -> None:
        super().__init__()
        widths = (code_dim, *hidden_channels)
        self.conv_in = nn.Conv2d(code_dim, code_dim, 3, padding=1)
        blocks: list[nn.Module] = []
        for width, following in pairwise(widths):
            blocks += [nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, following, 3, padding=1)]
        self.blocks = nn.ModuleList(blocks)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)
        # torch's own start would shrink codes of unit length to a two-hundredth before the zero convolution, which then
        # learns to pass on the biases first: after 300 steps pictures did not depend on their codes.
        for conv in (self.conv_in, *blocks):
            nn.init.kaiming_normal_(cast(Tensor, conv.weight), nonlinearity="relu")
            nn.init.zeros_(cast(Tensor, conv.bias))
        with torch.no_grad():
            self.conv_in.weight.mul_(code_dim**0.5)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(cast(Tensor, self.conv_out.bias))
        self.features: nn.Conv2d | None = None

    def hear(self, width: int) -> None:
        """Take features of the codes, too, through a further zero convolution; what comes out stays as it is."""
        self.features = nn.Conv2d(width, self.conv_out.out_channels, 1).to(self.conv_out.weight)
        nn.init.zeros_(self.features.weight)
        nn.init.zeros_(cast(Tensor, self.features.bias))

    def forward(self, codes: Tensor) -> Tensor:
        """Map code embeddings (B, d, h, w), and after them features that it hears, to (B, out_channels, h, w)."""
        dim = self.conv_in.in_channels
        hidden = F.silu(self.conv_in(codes[:, :dim]))
        for block in self.blocks:
            hidden = F.silu(block(hidden))
        embedded: Tensor = self.conv_out(hidden)
        return embedded if self.features is None else embedded + self.features(codes[:, dim:])


def copy_encoder(
    unet: UNet2DConditionModel, *, code_dim: int, hidden_channels: Sequence[int] = PAPER_CHANNELS
) -> ControlNetModel:
    """Trainable copy of the UNet's encoder with zero convolutions and a stride-free ``CodeEmbedding``."""
    # ControlNetModel insists on an embedding with strides; the smallest one is built and replaced.
    branch = ControlNetModel.from_unet(
        unet, conditioning_embedding_out_channels=(code_dim,), conditioning_channels=code_dim
    )
    branch.controlnet_cond_embedding = CodeEmbedding(
        code_dim, int(unet.config.block_out_channels[0]), hidden_channels=hidden_channels
    )
    return branch.requires_grad_(True).train()


def resize_codes(codes: Tensor, *, size: tuple[int, int], mode: Resize) -> Tensor:
    """Bring code embeddings (B, d, h', w') to the latent grid (B, d, h, w); untouched if they have its size."""
    if (codes.shape[-2], codes.shape[-1]) == size:
        return codes
    if mode == "nearest":
        return F.interpolate(codes, size=size, mode=mode)
    return F.interpolate(codes, size=size, mode=mode, align_corners=False)


def base_state_dict(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """The UNet's own weights under their diffusers names, without adaptors injected by PEFT."""
    state = cast("dict[str, Tensor]", unet.state_dict())
    return {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}


def save_unet(unet: UNet2DConditionModel, folder: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write the bare UNet in diffusers' format, so that ``UNet2DConditionModel.from_pretrained`` reads it."""
    config = cast("dict[str, JsonValue]", json.loads(unet.to_json_string()))
    save_tensors(folder / "diffusion_pytorch_model.safetensors", base_state_dict(unet), dtype=dtype)
    save_config(folder, config)


def load_unet(folder: Path | str) -> UNet2DConditionModel:
    """The UNet of a diffusers folder, in the type it is stored in; safetensors only, no network.

    Raises:
        ValueError: There is none, or weights are missing.
    """
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{folder} holds no UNet: there is no config.json")
    unet: UNet2DConditionModel = UNet2DConditionModel.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, variant=variant_of(folder)
    )
    require_weights(unet, folder)
    return unet


@dataclass(frozen=True, slots=True, eq=False)
class PipelineParts:
    """What a decoder takes from a latent diffusion model.

    Attributes:
        unet: Its denoiser.
        scheduler_config: The diffusers configuration of its noise schedule.
        pixels_per_latent: Image side over latent side.
    """

    unet: UNet2DConditionModel
    scheduler_config: dict[str, JsonValue]
    pixels_per_latent: int


def read_pipeline(folder: Path) -> PipelineParts:
    """Read the parts from a local diffusers pipeline folder.

    Raises:
        ValueError: A part of the folder is missing.
    """
    configs: dict[str, dict[str, JsonValue]] = {}
    for needed in ("unet/config.json", "scheduler/scheduler_config.json", "vae/config.json"):
        if not (folder / needed).is_file():
            raise ValueError(f"{folder} is no diffusers pipeline folder: {needed} is missing")
        configs[needed] = json.loads((folder / needed).read_text(encoding="utf-8"))
    levels = cast("list[int]", configs["vae/config.json"]["block_out_channels"])
    return PipelineParts(
        unet=load_unet(folder / "unet"),
        scheduler_config=configs["scheduler/scheduler_config.json"],
        pixels_per_latent=2 ** (len(levels) - 1),
    )


@torch.no_grad()
def encode_null_caption(folder: str | Path) -> Tensor:
    """The empty caption (L, D) as a pipeline with one CLIP text encoder (SD1.5, SD2.1, our own) encodes it.

    SDXL-shaped models take zeros for the empty caption instead, which is the decoder's default.

    Args:
        folder: Local diffusers pipeline folder with ``tokenizer/`` and ``text_encoder/``.

    Raises:
        ValueError: One of the two is missing.
    """
    from transformers import AutoTokenizer, CLIPTextModel

    root = Path(folder)
    for needed in ("tokenizer", "text_encoder"):
        if not (root / needed).is_dir():
            raise ValueError(f"{root} has no {needed} to encode the empty caption with")
    tokenizer = AutoTokenizer.from_pretrained(root / "tokenizer", local_files_only=True)
    place = root / "text_encoder"
    stored = CLIPTextModel.from_pretrained(
        place, local_files_only=True, use_safetensors=True, variant=variant_of(place)
    )
    text_encoder = stored.float().eval()
    tokens = tokenizer("", padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt")
    return cast(Tensor, text_encoder(tokens.input_ids)[0][0])


def null_caption(folder: str | Path) -> Tensor | None:
    """What a decoder on a pipeline is to take for the empty caption: see `encode_null_caption`; None for zeros.

    Args:
        folder: Local diffusers pipeline folder; with two text encoders (SDXL), or none, zeros it is.

    Raises:
        ValueError: The tokenizer is missing.
    """
    root = Path(folder)
    alone = (root / "text_encoder").is_dir() and not (root / "text_encoder_2").is_dir()
    return encode_null_caption(root) if alone else None
