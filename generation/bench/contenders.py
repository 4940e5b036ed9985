"""What `generation.bench.decoding` measures: this library, its linear layers alone, and a Llama of transformers."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from generation.model.packing import PackedLinear
from generation.model.shapes import SIZES, CaptionShape
from generation.model.transformer import LaytonGenTransformer
from generation.sampling.codes import GREEDY
from generation.sampling.decoding import generate_codes
from generation.sampling.guidance import Guidance
from layton.bench.report import Clock


@dataclass(frozen=True, slots=True)
class BenchShape:
    """What is measured.

    Attributes:
        name: In the report.
        size: Name in `generation.model.shapes.SIZES`.
        peer_goal: Goal of P3.
        caption_length: Caption tokens.
        caption_dim: Width of their features.
        vocab_size: V.
        num_tokens: N.
    """

    name: str
    size: str
    peer_goal: float
    caption_length: int = 120
    caption_dim: int = 2048
    vocab_size: int = 16384
    num_tokens: int = 256


def build(shape: BenchShape) -> LaytonGenTransformer:
    """A model with random weights from seed 0 and a head that is not zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LaytonGenTransformer.from_size(
            shape.size,
            caption=CaptionShape(shape.caption_dim, shape.caption_length),
            vocab_size=shape.vocab_size,
            num_tokens=shape.num_tokens,
            zero_head=False,
        ).eval()


def captions(shape: BenchShape, batch: int) -> Tensor:
    """Random text features (B, L, dim)."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, shape.caption_length, shape.caption_dim, generator=generator)


def step_times(model: LaytonGenTransformer, features: Tensor, scale: float, count: int, clock: Clock) -> list[float]:
    """Seconds between one code and the next while images are generated greedily."""
    stamps: list[float] = []
    generate_codes(
        model,
        features,
        sampling=GREEDY,
        guidance=Guidance(scale),
        num_codes=count,
        callback=lambda _index, _codes: stamps.append(clock()),
    )
    return [later - earlier for earlier, later in pairwise(stamps)]


def linear_layers(model: LaytonGenTransformer) -> list[nn.Linear | PackedLinear]:
    """The layers that every step runs."""
    named = [*model.blocks.named_modules(), *model.vocabulary.named_modules()]
    return [layer for _, layer in named if isinstance(layer, nn.Linear | PackedLinear)]


@torch.inference_mode()
def floor_times(model: LaytonGenTransformer, rows: int, count: int, clock: Clock) -> list[float]:
    """Seconds of the model's linear layers alone, on ready inputs of as many rows."""
    layers = linear_layers(model)
    inputs = [torch.randn(rows, 1, layer.in_features) for layer in layers]
    times = []
    for _ in range(count):
        start = clock()
        for layer, x in zip(layers, inputs, strict=True):
            layer(x)
        times.append(clock() - start)
    return times


def build_peer(model: LaytonGenTransformer, shape: BenchShape) -> nn.Module:
    """A Llama of transformers with the same width, depth, heads, hidden width and vocabulary, and random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size = SIZES[shape.size]
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=size.width,
        intermediate_size=model.blocks[0].ffn.down.in_features,  # type: ignore[union-attr]
        num_hidden_layers=size.depth,
        num_attention_heads=size.num_heads,
        max_position_embeddings=shape.caption_length + shape.num_tokens,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    peer: nn.Module = LlamaForCausalLM(config).eval()
    return peer


def peer_times(peer: nn.Module, shape: BenchShape, rows: int, count: int, clock: Clock) -> list[float]:
    """Seconds between one token and the next in transformers' greedy ``generate``."""
    from transformers import LogitsProcessorList

    stamps: list[float] = []

    def stamp(_ids: Tensor, scores: Tensor) -> Tensor:
        stamps.append(clock())
        return scores

    prompt = torch.ones(rows, shape.caption_length, dtype=torch.int64)
    with torch.inference_mode():
        peer.generate(  # type: ignore[operator]
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=count,
            min_new_tokens=count,
            logits_processor=LogitsProcessorList([stamp]),
        )
    return [later - earlier for earlier, later in pairwise(stamps)]


@torch.no_grad()
def decodes_like_a_full_pass(model: LaytonGenTransformer, shape: BenchShape) -> bool:
    """Whether greedy decoding finds, at every code, what one uncached pass over its codes finds likeliest."""
    features = captions(shape, 1)
    count = min(32, shape.num_tokens)
    codes = generate_codes(model, features, sampling=GREEDY, num_codes=count)
    return bool(torch.equal(model(codes, features).argmax(dim=-1), codes))


@torch.no_grad()
def decode_alike(one: LaytonGenTransformer, other: LaytonGenTransformer, shape: BenchShape) -> bool:
    """Whether guided greedy decoding finds the same codes with both."""
    count = min(32, shape.num_tokens)
    codes = [
        generate_codes(model, captions(shape, 1), sampling=GREEDY, guidance=Guidance(2.0), num_codes=count)
        for model in (one, other)
    ]
    return bool(torch.equal(*codes))
