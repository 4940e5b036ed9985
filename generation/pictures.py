"""Decoded batches as the pictures that were asked for, in the manner of diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from layton.data.images import to_image

OutputType = Literal["pil", "np", "pt", "codes"]
OUTPUT_TYPES: tuple[OutputType, ...] = ("pil", "np", "pt", "codes")
Pictures = list[Image.Image] | NDArray[np.float32] | Tensor


def finish(images: Tensor, output_type: OutputType) -> Pictures:
    """Images (B, 3, H, W) in [-1, 1] of one batch as they are wanted: see `generation.pipeline.LaytonGenOutput`."""
    if output_type == "pil":
        return [to_image(image) for image in images]
    scaled = (images.clamp(-1, 1) + 1) / 2
    return scaled if output_type == "pt" else rearrange(scaled, "b c h w -> b h w c").numpy()


def join(batches: Sequence[Any], output_type: OutputType) -> Pictures:
    """What `finish` gave for several batches as one; an empty list for "codes"."""
    if output_type == "np":
        return np.concatenate(batches)
    return torch.cat(list(batches)) if output_type == "pt" else [image for batch in batches for image in batch]
