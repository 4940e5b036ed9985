"""The released LaCTok tokenizer (arXiv 2503.08377) into this library's parts.

Its file holds ``encoder.*``, ``quant_conv.*``, ``quantize.*`` and ``post_quant_conv.*`` of a LlamaGen VQ-16, then
``decoder.unet.*`` (an SDXL UNet, under ``base_model.model.`` when PEFT wraps it), ``decoder.controlnet.*`` and
``vae.*``, at the top or under ``model`` or ``state_dict``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from layton.control import PAPER_CHANNELS, TLCM_LORA_TARGETS, LoraSettings, save_unet
from layton.convert.checkpoint import ConvertError, read_checkpoint
from layton.convert.layout import Layout, Slot, require, slot, take
from layton.convert.llamagen import (
    USAGE_BUFFER,
    VQGANShape,
    codebook_layout,
    cosine_quantizer,
    count,
    vqgan_layout,
)
from layton.convert.released import (
    RELEASED_CONDITION_SCALE,
    RELEASED_LORA_ALPHA,
    RELEASED_TIMESTEPS,
    SDXL_SCHEDULER,
    SDXL_UNET,
    SDXL_VAE,
)
from layton.folder import JsonValue, save_config, save_tensors
from layton.ladd import LADD
from layton.quantizers import CosineVQ
from layton.vqgan import VQGANEncoder

PEFT_PREFIX = "decoder.unet.base_model.model."
UNET_PREFIX = "decoder.unet."
CONTROL_PREFIX = "decoder.controlnet."


@dataclass(frozen=True, slots=True, eq=False)
class ConvertedParts:
    """The tokenizer as this library's parts, all in eval mode.

    Attributes:
        encoder: Images (B, 3, H, W) to features (B, 8, H / 16, W / 16).
        quantizer: Features to codes and back; the codes have unit length.
        decoder: Code embeddings and noisy latents to predictions; holds the frozen UNet.
        vae: Latents to pixels; None if the file was said to hold none.
        timesteps: At which the decoder was distilled to be asked, noisiest first.
        unused: Names in the file that no part needs.
    """

    encoder: VQGANEncoder
    quantizer: CosineVQ
    decoder: LADD
    vae: AutoencoderKL | None
    timesteps: tuple[int, ...]
    unused: tuple[str, ...]

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write ``encoder/``, ``quantizer/``, ``decoder/``, ``unet/`` and ``vae/``, each a config and safetensors.

        Args:
            folder: Where to write; made if needed.
            dtype: Floating-point type on disk, default the parts' own. Codes are always stored in fp32.
        """
        root = Path(folder)
        self.encoder.save_pretrained(root / "encoder", dtype=dtype)
        self.quantizer.save_pretrained(root / "quantizer")
        self.decoder.save_pretrained(root / "decoder", dtype=dtype)
        save_unet(self.decoder.unet, root / "unet", dtype=dtype)
        if self.vae is not None:
            save_tensors(root / "vae" / "diffusion_pytorch_model.safetensors", self.vae.state_dict(), dtype=dtype)
            save_config(root / "vae", {**self.vae.config, "_class_name": "AutoencoderKL"})


def convert_tokenizer(
    path: str | Path,
    *,
    lora: Literal["keep", "merge"] = "keep",
    lora_alpha: float = RELEASED_LORA_ALPHA,
    lora_targets: Sequence[str] = TLCM_LORA_TARGETS,
    unet_config: Mapping[str, JsonValue] = SDXL_UNET,
    vae_config: Mapping[str, JsonValue] | None = SDXL_VAE,
    scheduler_config: Mapping[str, JsonValue] = SDXL_SCHEDULER,
    conditioning_scale: float = RELEASED_CONDITION_SCALE,
    ignore: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
) -> ConvertedParts:
    """Convert a released tokenizer file; nothing is loaded unless every tensor has its place.

    Args:
        path: ``.pth`` (read with ``weights_only=True``) or ``.safetensors``.
        lora: Keep the UNet's adaptors apart, or merge them into its weights.
        lora_alpha: Alpha of the adaptors, which the file does not hold; their scale is alpha over rank.
        lora_targets: Endings of the names of the adapted layers.
        unet_config: diffusers configuration of the UNet.
        vae_config: diffusers configuration of the autoencoder; None if the file has none.
        scheduler_config: diffusers configuration of the noise schedule.
        conditioning_scale: Default factor on the control branch's residuals.
        ignore: Names, or prefixes that end in a dot, to leave out without complaint.
        dtype: Floating-point type of the parts; the codes stay fp32.

    Raises:
        ConvertError: The file is unreadable, or has missing, unknown, mis-shaped or non-finite tensors; all are
            listed.
    """
    state = read_checkpoint(path)
    shape = VQGANShape.read(state)
    settings = read_lora(state, alpha=lora_alpha, targets=lora_targets, source=path)
    channels = read_embedding_channels(state)
    with torch.device("meta"):
        encoder = shape.encoder()
        unet = UNet2DConditionModel.from_config(dict(unet_config))
        vae = None if vae_config is None else AutoencoderKL.from_config(dict(vae_config))
        template = LADD(
            UNet2DConditionModel.from_config(dict(unet_config)),
            code_dim=shape.code_dim,
            scheduler_config=scheduler_config,
            embedding_channels=channels,
            lora=settings,
        )
    layout = vqgan_layout("encoder", encoder) | codebook_layout(state, code_dim=shape.code_dim)
    unused = unused_layout(shape)
    layout |= unused | decoder_layout(template)
    if vae is not None:
        layout |= {f"vae.{key}": slot("vae", key, value) for key, value in vae.state_dict().items()}
    require(layout, state, source=path, ignored=(USAGE_BUFFER, *ignore))

    encoder.load_state_dict(take(layout, state, "encoder", dtype=dtype), assign=True)
    unet.load_state_dict(take(layout, state, "unet", dtype=dtype), assign=True)
    if vae is not None:
        vae.load_state_dict(take(layout, state, "vae", dtype=dtype), assign=True)
    decoder = LADD(
        unet,
        code_dim=shape.code_dim,
        scheduler_config=scheduler_config,
        embedding_channels=channels,
        conditioning_scale=conditioning_scale,
        pixels_per_latent=8 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1),
        lora=settings,
    ).to(dtype)
    branch = take(layout, state, "decoder", dtype=dtype)
    decoder.load_branch_state_dict(branch | {"null_embeds": decoder.null_embeds}, source=path)
    if lora == "merge":
        decoder.merge_lora()
    return ConvertedParts(
        encoder=encoder.eval(),
        quantizer=cosine_quantizer(take(layout, state, "quantizer", dtype=torch.float32)["codebook"]),
        decoder=decoder.eval(),
        vae=None if vae is None else vae.eval(),
        timesteps=RELEASED_TIMESTEPS,
        unused=tuple(sorted([*unused, *(state.keys() - layout.keys())])),
    )


def unused_layout(shape: VQGANShape) -> Layout:
    """``post_quant_conv``, left over from LlamaGen: LaCTok's decoder reads the codes before it."""
    sizes = {"weight": (shape.z_channels, shape.code_dim, 1, 1), "bias": (shape.z_channels,)}
    return {f"post_quant_conv.{key}": Slot("unused", key, size, size) for key, size in sizes.items()}


def decoder_layout(template: LADD) -> Layout:
    """Layout of the UNet (part "unet"), and of its adaptors and the control branch (part "decoder")."""
    layout: Layout = {}
    prefix = UNET_PREFIX if template.lora is None else PEFT_PREFIX
    for key, value in template.unet.state_dict().items():
        if ".lora_" in key:
            layout[prefix + key] = slot("decoder", "lora." + key.replace(".default.", "."), value)
        else:
            layout[prefix + key] = slot("unet", key.replace(".base_layer.", "."), value)
    for key, value in template.controlnet.state_dict().items():
        layout[CONTROL_PREFIX + key] = slot("decoder", f"controlnet.{key}", value)
    return layout


def read_lora(
    state: Mapping[str, Tensor], *, alpha: float, targets: Sequence[str], source: Path | str
) -> LoraSettings | None:
    """The adaptors' settings; their rank is that of the file. None if the UNet is not wrapped by PEFT.

    Raises:
        ConvertError: The adaptors differ in rank.
    """
    if not any(name.startswith(PEFT_PREFIX) for name in state):
        return None
    ranks = {name: value.shape[0] for name, value in state.items() if name.endswith(".lora_A.default.weight")}
    if len(set(ranks.values())) > 1:
        raise ConvertError(source, [f"adaptor {name} has rank {rank}" for name, rank in sorted(ranks.items())])
    return LoraSettings(rank=next(iter(ranks.values()), 64), alpha=alpha, targets=tuple(targets))


def read_embedding_channels(state: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Widths of the code embedding after d, from every second of its convolutions; the paper's if they are missing."""
    stem = f"{CONTROL_PREFIX}controlnet_cond_embedding.blocks."
    blocks = range(1, count(state, rf"^{stem.replace('.', '[.]')}(\d+)[.]"), 2)
    names = [f"{stem}{block}.weight" for block in blocks]
    if not names or any(name not in state for name in names):
        return PAPER_CHANNELS
    return tuple(state[name].shape[0] for name in names)
