"""Tiny parts with random weights: a tokenizer, a text encoder, a generator, and folders of them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn import functional as F

from generation.generator import Generator, GeneratorCard, SamplingDefaults, TokenizerFacts, save_generator
from generation.model.layout import LayoutShape
from generation.model.shapes import CaptionShape, Dropout, Factors
from generation.model.transformer import LaytonGenTransformer
from generation.planner import LayoutPlanner
from generation.text.encoders import TransformersTextEncoder
from layton.decoders import LightDecoder
from layton.encoder import ViTEncoder
from layton.ldm.text import build_text_encoder, build_tokenizer
from layton.pixel_decoder import PixelDecoder
from layton.quantizers import CosineVQ
from layton.scenes import render, sample_scene
from layton.tokenizer import LaytonTokenizer

SIZE, TOKENS, CODES, LENGTH, WIDTH = 32, 16, 64, 32, 16
WORDS = ["a red circle", "two blue stars", "a green ring left of a red star", "three hearts", "photo"]


def tiny_tokenizer(*, seed: int = 0) -> LaytonTokenizer:
    """4 x 4 tokens of 64 codes for 32 pixels."""
    torch.manual_seed(seed)
    points = torch.randn(CODES, 4, generator=torch.Generator().manual_seed(seed))
    quantizer = CosineVQ(vocab_size=CODES, code_dim=4, start_points=0)
    quantizer.set_codebook(F.normalize(points, dim=-1))
    encoder = ViTEncoder(code_dim=4, width=32, depth=1, num_heads=2, patch_size=8, stem_width=8).eval()
    scenes = torch.stack([torch.from_numpy(render(sample_scene(n), SIZE)).permute(2, 0, 1) for n in range(4)])
    with torch.no_grad():  # centred features, so that random weights still use many codes
        encoder.head.bias -= encoder(scenes.float() / 127.5 - 1).mean(dim=(0, 2, 3))
    decoder = LightDecoder(PixelDecoder(4, 32, 1, 2, fine_width=8, num_fine_blocks=1, patch_size=8))
    return LaytonTokenizer(encoder, quantizer.eval(), {"light": decoder}, image_size=SIZE).eval()


def tiny_text_encoder(*, seed: int = 0, trainable: bool = False) -> TransformersTextEncoder:
    """A CLIP text model of one layer with a vocabulary of a few words and all bytes."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(WORDS, vocab_size=800, max_length=LENGTH)
    model = build_text_encoder(tokenizer, width=WIDTH, depth=1, num_heads=2)
    return TransformersTextEncoder(tokenizer, model, trainable=trainable, name="tiny")


def tiny_transformer(*, seed: int = 0, dropout: float = 0.1) -> LaytonGenTransformer:
    """Two blocks; the head is not zero, so that captions matter."""
    torch.manual_seed(seed)
    return LaytonGenTransformer(
        width=32,
        depth=2,
        num_heads=2,
        hidden=64,
        caption=CaptionShape(WIDTH, LENGTH),
        vocab_size=CODES,
        num_tokens=TOKENS,
        factors=Factors(4, 4),
        dropout=Dropout(dropout, dropout, dropout),
        zero_head=False,
    ).eval()


def tiny_generator(tokenizer: LaytonTokenizer, *, sharpness: float = 20.0) -> Generator:
    """A generator for a tokenizer; ``sharpness`` spreads its logits."""
    transformer, encoder = tiny_transformer(), tiny_text_encoder()
    transformer.set_codebook(tokenizer.quantizer.codebook)
    with torch.no_grad():
        for weight in (
            transformer.vocabulary.out_of.weight,
            transformer.prefix.fc1.weight,
            transformer.prefix.fc2.weight,
        ):
            weight.mul_(sharpness)
    card = GeneratorCard(TokenizerFacts.of(tokenizer), encoder.fingerprint(), SamplingDefaults(guidance_scale=1.5))
    return Generator(transformer, encoder, card)


def tiny_planner(layout: LayoutShape) -> LayoutPlanner:
    """A planner for the tiny text encoder, whose head is not zero."""
    torch.manual_seed(0)
    sizes = {"width": 32, "depth": 1, "num_heads": 2, "hidden": 32}
    planner = LayoutPlanner(layout, CaptionShape(WIDTH, LENGTH), temperature=0.5, **sizes).eval()
    for weight in planner.transformer.vocabulary.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return planner


def write_model(folder: Path) -> Path:
    """A tokenizer with a generator beside it, in the layout of the embedded ``mini``."""
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    save_generator(folder / "laytongen", tiny_generator(tokenizer))
    return folder
