"""A tiny tokenizer with random weights, and helpers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

from layton.decoders import DiffusionDecoder, LightDecoder
from layton.encoder import ViTEncoder
from layton.ladd import LADD
from layton.ldm.autoencoder import Autoencoder
from layton.pixel_decoder import PixelDecoder
from layton.quantizers import CosineVQ
from layton.scenes import render, sample_scene
from layton.tokenizer import LaytonTokenizer

SIZE, TOKENS, CODES = 32, 16, 64
Run = Callable[..., str]


def codebook(seed: int) -> CosineVQ:
    points = torch.randn(CODES, 4, generator=torch.Generator().manual_seed(seed))
    quantizer = CosineVQ(vocab_size=CODES, code_dim=4, start_points=0)
    quantizer.set_codebook(F.normalize(points, dim=-1))
    return quantizer.eval()


def tiny_tokenizer(*, seed: int = 0, ldm: Path | None = None) -> LaytonTokenizer:
    torch.manual_seed(seed)
    encoder = ViTEncoder(code_dim=4, width=32, depth=1, num_heads=2, patch_size=8, stem_width=8).eval()
    scenes = torch.stack([torch.from_numpy(render(sample_scene(n), SIZE)).permute(2, 0, 1) for n in range(8)])
    with torch.no_grad():  # centred features, so that random weights still use many codes
        encoder.head.bias -= encoder(scenes.float() / 127.5 - 1).mean(dim=(0, 2, 3))
    network = PixelDecoder(4, 32, 1, 2, fine_width=8, num_fine_blocks=1, patch_size=8)
    decoders = {"light": LightDecoder(network)}
    if ldm is not None:
        ladd = LADD.from_pipeline(ldm, code_dim=4, embedding_channels=(8,))
        torch.nn.init.normal_(ladd.controlnet.controlnet_down_blocks[0].weight, std=0.5)
        decoders["diffusion"] = DiffusionDecoder(ladd, Autoencoder.from_pretrained(ldm / "vae"))
    return LaytonTokenizer(encoder, codebook(seed), decoders, image_size=SIZE).eval()


def tree(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
