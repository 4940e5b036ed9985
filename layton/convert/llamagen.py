"""LlamaGen's VQ tokenizer (arXiv 2406.06525): names, shapes and conversion of ``vq_ds16_*.pt`` and ``vq_ds8_*.pt``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layton.convert.checkpoint import read_checkpoint
from layton.convert.layout import Layout, Slot, require, slot, take
from layton.quantizers import CosineVQ
from layton.vqgan import VQ16_MULTIPLIERS, VQGANDecoder, VQGANEncoder

USAGE_BUFFER = "quantize.codebook_used"
"""A training statistic that some checkpoints carry; of no use and always left out."""

_TO_OFFICIAL = (
    (r"^(encoder)\.down_blocks\.(\d+)\.", r"\1.conv_blocks.\2."),
    (r"^(decoder)\.up_blocks\.(\d+)\.", r"\1.conv_blocks.\2."),
    (r"\.mid_block\.resnets\.0\.", ".mid.0."),
    (r"\.mid_block\.attentions\.0\.", ".mid.1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.2."),
    (r"\.resnets\.(\d+)\.", r".res.\1."),
    (r"\.attentions\.(\d+)\.", r".attn.\1."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.downsamplers\.0\.", ".downsample."),
    (r"\.upsamplers\.0\.", ".upsample."),
    (r"\.group_norm\.", ".norm."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".proj_out."),
    (r"\.conv_norm_out\.", ".norm_out."),
)


def official_name(key: str) -> str:
    """LlamaGen's name of a tensor of ``VQGANEncoder`` or ``VQGANDecoder``."""
    for pattern, replacement in _TO_OFFICIAL:
        key = re.sub(pattern, replacement, key)
    return key


def vqgan_layout(part: str, module: nn.Module) -> Layout:
    """Layout of one half of the tokenizer; attention's linear layers are 1x1 convolutions in the file."""
    layout: Layout = {}
    for key, value in module.state_dict().items():
        pixelwise = ".attentions." in key and value.ndim == 2
        layout[official_name(key)] = slot(part, key, value, file_shape=(*value.shape, 1, 1) if pixelwise else None)
    return layout


def codebook_layout(state: Mapping[str, Tensor], *, code_dim: int) -> Layout:
    """Layout of the codebook (V, d), with V taken from the file."""
    name = "quantize.embedding.weight"
    size = state[name].shape[0] if name in state and state[name].ndim == 2 else 16384
    return {name: Slot("quantizer", "codebook", (size, code_dim), (size, code_dim))}


@dataclass(frozen=True, slots=True)
class VQGANShape:
    """Constructor arguments of ``VQGANEncoder`` and ``VQGANDecoder``."""

    code_dim: int = 8
    channels: int = 128
    multipliers: Sequence[int] = VQ16_MULTIPLIERS
    num_res_blocks: int = 2
    z_channels: int = 256

    @classmethod
    def read(cls, state: Mapping[str, Tensor]) -> VQGANShape:
        """Read the shape off the encoder's tensors; where they are missing, VQ-16's stands and the check tells."""
        try:
            channels = state["encoder.conv_in.weight"].shape[0]
            num_levels = count(state, r"^encoder\.conv_blocks\.(\d+)\.")
            widths = [state[f"encoder.conv_blocks.{level}.res.0.conv2.weight"].shape[0] for level in range(num_levels)]
            shape = cls(
                code_dim=state["quant_conv.weight"].shape[0],
                channels=channels,
                multipliers=tuple(max(1, width // channels) for width in widths),
                num_res_blocks=count(state, r"^encoder\.conv_blocks\.0\.res\.(\d+)\."),
                z_channels=state["quant_conv.weight"].shape[1],
            )
        except (KeyError, IndexError):
            return cls()
        return shape if num_levels and channels % 32 == 0 else cls()

    def encoder(self) -> VQGANEncoder:
        """An untrained encoder of this shape."""
        return VQGANEncoder(
            code_dim=self.code_dim,
            channels=self.channels,
            multipliers=self.multipliers,
            num_res_blocks=self.num_res_blocks,
            z_channels=self.z_channels,
        )

    def decoder(self) -> VQGANDecoder:
        """An untrained pixel decoder of this shape."""
        return VQGANDecoder(
            code_dim=self.code_dim,
            channels=self.channels,
            multipliers=self.multipliers,
            num_res_blocks=self.num_res_blocks,
            z_channels=self.z_channels,
        )


def count(state: Mapping[str, Tensor], pattern: str) -> int:
    """One more than the largest number that ``pattern``'s group matches among the names; 0 without a match."""
    found = (re.match(pattern, name) for name in state)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def cosine_quantizer(codebook: Tensor) -> CosineVQ:
    """A ready quantizer with these codes (V, d), which are brought to unit length as LlamaGen does at each use."""
    quantizer = CosineVQ(vocab_size=codebook.shape[0], code_dim=codebook.shape[1], start_points=0)
    quantizer.set_codebook(F.normalize(codebook.float(), dim=-1))
    return quantizer.eval()


@dataclass(frozen=True, slots=True, eq=False)
class ConvertedVQGAN:
    """LlamaGen's tokenizer as this library's parts, all in eval mode.

    Attributes:
        encoder: Images to features.
        quantizer: Features to codes and back.
        decoder: Code embeddings to pixels.
    """

    encoder: VQGANEncoder
    quantizer: CosineVQ
    decoder: VQGANDecoder


def convert_vqgan(
    path: str | Path, *, ignore: Sequence[str] = (), dtype: torch.dtype = torch.float32
) -> ConvertedVQGAN:
    """Convert a LlamaGen VQ checkpoint; its shape is read off the tensors.

    Of a file with averaged weights (``ema``) those are taken, as by LlamaGen's own scripts.

    Args:
        path: ``.pt`` or ``.safetensors``.
        ignore: Names of tensors, or prefixes that end in a dot, that are left out of the check.
        dtype: Floating-point type of encoder and decoder; the codes stay fp32.

    Raises:
        ConvertError: The file is unreadable or has missing, unknown or mis-shaped tensors; all are listed.
    """
    state = read_checkpoint(path, averaged=True)
    shape = VQGANShape.read(state)
    with torch.device("meta"):
        encoder, decoder = shape.encoder(), shape.decoder()
    layout = vqgan_layout("encoder", encoder) | vqgan_layout("decoder", decoder)
    layout |= codebook_layout(state, code_dim=shape.code_dim)
    require(layout, state, source=path, ignored=(USAGE_BUFFER, *ignore))
    encoder.load_state_dict(take(layout, state, "encoder", dtype=dtype), assign=True)
    decoder.load_state_dict(take(layout, state, "decoder", dtype=dtype), assign=True)
    codebook = take(layout, state, "quantizer", dtype=torch.float32)["codebook"]
    return ConvertedVQGAN(encoder.eval(), cosine_quantizer(codebook), decoder.eval())
