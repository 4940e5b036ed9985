"""``layton convert gpt``: released GPT checkpoints into generators, or into transformers alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from layton.errors import UsageError
from layton.options import require_least
from layton.staging import require_absent

if TYPE_CHECKING:
    from generation.generator import Generator
    from generation.model.transformer import LaytonGenTransformer
    from layton.tokenizer import LaytonTokenizer

_PUBLISHED = {"laytongen": (2.0, 0.1), "llamagen": (7.5, 1.0)}  # guidance and temperature


def convert_gpt(
    checkpoint: Path,
    *,
    out: Path,
    num_heads: int | None = None,
    num_tokens: int | None = None,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    tokenizer: str | None = None,
    text_encoder: str | None = None,
    sampling: Literal["laytongen", "llamagen"] | None = None,
    allow: list[str] | None = None,
) -> int:
    """Convert a LaCTokGen-T or LlamaGen GPT checkpoint: into a generator, or into its transformer alone.

    With --tokenizer and --text-encoder, which the checkpoint was trained with, the folder is one that `layton generate`
    draws from; else it is one for `LaytonGenTransformer.from_pretrained`. Sizes are read off the tensors. Every tensor
    of the file must be known, and every tensor needed must be there with its shape; else nothing is written and the
    first problems are listed.

    Args:
        checkpoint: a .pth, .pt or .safetensors file; nothing in it is executed.
        out: folder to write; must not exist.
        num_heads: attention heads; those of the released model of that width if not given.
        num_tokens: image tokens: 256 for 256 pixels, 576 for 384, 1024 for 512; those of the tokenizer, or 256.
        dtype: of the weights on disk.
        tokenizer: embedded tokenizer or folder that made the codes; `layton convert` makes one of a released one.
        text_encoder: folder of the text encoder in transformers' format: flan-t5-xl for the released models.
        sampling: whose published way of drawing a generator has: laytongen (the default), guidance 2 and temperature
            0.1, or llamagen, 7.5 and 1. The checkpoints are alike, and do not say which they are.
        allow: dotted names, or their beginnings, of classes of your own that the tokenizer may name.
    """
    import torch

    from generation.convert import convert_gpt as convert
    from generation.generator import save_generator
    from layton.convert import ConvertError
    from layton.staging import staged
    from layton.tokenizer import LaytonTokenizer

    require_least(1, {"num_heads": num_heads, "num_tokens": num_tokens})
    require_absent(out)
    if sampling is not None and (tokenizer is None or text_encoder is None):
        raise UsageError("--sampling is of a generator, which needs --tokenizer and --text-encoder")
    kind: torch.dtype = getattr(torch, dtype)
    given = None if tokenizer is None else LaytonTokenizer.from_pretrained(tokenizer, decoders=[], allow=allow or ())
    tokens = num_tokens or (256 if given is None else given.num_tokens)
    try:
        model = convert(checkpoint, num_heads=num_heads, num_tokens=tokens, dtype=kind)
    except ConvertError as error:
        sys.stderr.write(f"layton: {error.told()}\n")
        return 1
    missing = _missing(model, tokenizer=tokenizer, text_encoder=text_encoder)
    with staged(out) as folder:
        if missing or given is None or text_encoder is None:
            model.save_pretrained(folder, dtype=kind)
        else:
            save_generator(folder, _generator(model, given, text_encoder, sampling or "laytongen"), dtype=kind)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    hint = missing or f'now: layton generate "PROMPT" --model {out} --tokenizer {tokenizer}'
    sys.stdout.write(f"{parameters / 1e6:.0f}M parameters, {model.vocab_size} codes\n{out}\n{hint}\n")
    return 0


def _missing(model: LaytonGenTransformer, *, tokenizer: str | None, text_encoder: str | None) -> str:
    """Why the model is no generator that `layton generate` loads, in one line; empty if it is.

    Raises:
        ValueError: If parts of a generator were given that the model has no use for.
    """
    if model.caption is None:
        if tokenizer is not None or text_encoder is not None:
            raise ValueError("the checkpoint is of a class-conditional model: it has no use for a text encoder")
        return "the transformer alone, of a class-conditional model: `layton generate` needs one that reads captions"
    parts = {"--tokenizer": tokenizer, "--text-encoder": text_encoder}
    lacking = [option for option, value in parts.items() if value is None]
    return f"the transformer alone: `layton generate` needs {' and '.join(lacking)} too" if lacking else ""


def _generator(model: LaytonGenTransformer, tokenizer: LaytonTokenizer, text_encoder: str, sampling: str) -> Generator:
    """The model with the parts that it was trained with.

    Raises:
        ValueError: If they do not fit it.
    """
    from generation.generator import Generator, GeneratorCard, SamplingDefaults, TokenizerFacts
    from generation.text.encoders import text_encoder as load_text_encoder

    facts, shape = TokenizerFacts.of(tokenizer), model.caption
    if (model.vocab_size, model.num_tokens) != (facts.vocab_size, facts.num_tokens):
        raise ValueError(
            f"the checkpoint writes {model.num_tokens} of {model.vocab_size} codes, "
            f"the tokenizer has {facts.num_tokens} of {facts.vocab_size}"
        )
    encoder = load_text_encoder(text_encoder, max_length=None if shape is None else shape.length, cleaning="deepfloyd")
    if shape is None or encoder.width != shape.dim:
        raise ValueError(f"the checkpoint takes captions {shape}, {text_encoder} gives features of {encoder.width}")
    guidance, temperature = _PUBLISHED[sampling]
    published = SamplingDefaults(guidance, temperature, top_k=min(1000, model.vocab_size))
    return Generator(model, encoder.eval(), GeneratorCard(facts, encoder.fingerprint(), published))
