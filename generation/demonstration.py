"""LaytonGen's part of ``layton demo``: the same tokens shown by every decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from generation.drawing import LaytonGenDrawer
from generation.generator import find_generator
from generation.pipeline import LaytonGenPipeline
from layton.data.images import to_image
from layton.devices import choose_device


@dataclass(frozen=True, slots=True, eq=False)
class Demonstration:
    """Pictures of prompts.

    Attributes:
        pictures: By decoder, the default one first: number of the prompt to uint8 (H, W, 3).
        settings: How they were drawn.
    """

    pictures: dict[str, dict[int, NDArray[np.uint8]]]
    settings: dict[str, Any]


def has_generator(name: str) -> bool:
    """Whether there is a LaytonGen of this name or in this folder."""
    try:
        find_generator(name)
    except ValueError:
        return False
    return True


def draw_samples(
    name: str,
    prompts: Sequence[str],
    few: Sequence[int],
    *,
    device: str | None = None,
    allow: Sequence[str] | None = None,
) -> Demonstration:
    """Draw prompts once and show them: all of them by the default decoder, a few by each of the others.

    Args:
        name: Embedded model or folder.
        prompts: Texts; the picture of prompt i has the seed i.
        few: Numbers of the prompts that every decoder shows.
        device: Where to run; the accelerator if there is one.
        allow: Prefixes of class names that may be loaded beside this library's.
    """
    pipeline = LaytonGenPipeline.from_pretrained(name, allow=allow or ()).to(choose_device(device))
    tokenizer = pipeline.tokenizer
    codes = pipeline(list(prompts), output_type="codes").codes
    default = tokenizer.default_decoder
    pictures: dict[str, dict[int, NDArray[np.uint8]]] = {}
    for decoder in sorted(tokenizer.decoders, key=lambda each: each != default):
        numbers = list(range(len(prompts))) if decoder == default else list(few)
        noise = [torch.Generator().manual_seed(number) for number in numbers]
        images = tokenizer.decode(codes[numbers], decoder=decoder, generator=noise)
        pictures[decoder] = {n: np.asarray(to_image(image)) for n, image in zip(numbers, images, strict=True)}
    drawer = LaytonGenDrawer(pipeline, name, default)
    return Demonstration(pictures, drawer.settings())
