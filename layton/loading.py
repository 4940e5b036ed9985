"""Loading what a command works with, and the noise it starts from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from layton.interface import CodeDecoder
    from layton.tokenizer import LaytonTokenizer


def load_tokenizer(
    name: str,
    *,
    decoders: Sequence[str] | None = None,
    device: str | None = None,
    allow: Sequence[str] | None = None,
) -> LaytonTokenizer:
    """A tokenizer ready to work.

    Args:
        name: Embedded model or folder.
        decoders: Those to load; all by default, none for encoding alone.
        device: Where to run; by default the accelerator if there is one.
        allow: Prefixes of class names that may be loaded beside this library's.

    Raises:
        ValueError: If it does not exist or is damaged, or there is no decoder of a name.
    """
    from layton.devices import choose_device
    from layton.tokenizer import LaytonTokenizer

    return LaytonTokenizer.from_pretrained(name, decoders=decoders, allow=allow or ()).to(choose_device(device))


def load_with_decoder(
    name: str,
    decoder: str | None,
    *,
    num_steps: int | None,
    device: str | None = None,
    allow: Sequence[str] | None = None,
) -> tuple[LaytonTokenizer, str]:
    """A tokenizer with one decoder, and the decoder's name.

    Args:
        name: Embedded model or folder.
        decoder: Its name; the tokenizer's default by default.
        num_steps: Checked against what the decoder was trained for.
        device: Where to run.
        allow: As `load_tokenizer`.

    Raises:
        ValueError: As `load_tokenizer`, or for a number of steps the decoder was not trained for.
    """
    chosen = decoder if decoder is not None else default_decoder(name)
    tokenizer = load_tokenizer(name, decoders=[chosen], device=device, allow=allow)
    tokenizer.decoder(chosen).check_steps(num_steps)
    return tokenizer, chosen


def decoding_facts(
    tokenizer: LaytonTokenizer, decoder: str, *, num_steps: int | None, conditioning_scale: float | None, seed: int
) -> dict[str, Any]:
    """What a `layton.metrics.protocol.Protocol` says of a tokenizer's pictures: whose weights, how decoded."""
    from layton.modules import weights_digest

    part = tokenizer.decoder(decoder)
    return {
        "weights": weights_digest(tokenizer.encoder, tokenizer.quantizer, part),
        "decoder": decoder,
        "num_inference_steps": part.check_steps(num_steps),
        "decoder_sampling": part.sampling_record(),
        "condition_scale": part.default_scale if conditioning_scale is None else conditioning_scale,
        "seeds": {"noise of every image": seed},
    }


def default_decoder(name: str) -> str:
    """The decoder that a saved tokenizer names as its default."""
    from layton import assets
    from layton.folder import load_config
    from layton.tokenizer import CLASS_NAME

    return str(load_config(assets.resolve(name), expected_class=CLASS_NAME)["default_decoder"])


def same_noise(seed: int, count: int) -> list[torch.Generator]:
    """One generator for each image, all alike: a picture depends on its codes and the seed, not on its neighbours.

    Raises:
        ValueError: If the seed is negative.
    """
    import torch

    if seed < 0:
        raise ValueError(f"the seed must be >= 0, got {seed}")
    return [torch.Generator().manual_seed(seed) for _ in range(count)]


def describe(decoder: CodeDecoder, name: str, num_steps: int | None) -> str:
    """A decoder for people: its name, and the steps where they are a choice."""
    steps = decoder.check_steps(num_steps)
    return name if decoder.steps == (1,) and not decoder.needs_ldm else f"{name}, {steps} step{'s' * (steps != 1)}"
