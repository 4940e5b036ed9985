"""Prompts encoded once: distillation then never runs a text encoder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from distill.condition import Condition
from layton.assets import find_pipeline
from layton.data.cache import CachedTensors
from layton.data.randomness import mix
from layton.data.sources import SampleSource
from layton.devices import choose_device
from layton.ldm.cache import digest, words_digest
from layton.ldm.conditions import PromptEncoder, latent_shape_of, pixels_per_latent
from layton.ldm.teacher import open_outline, open_pipeline

CONDITION_FIELDS = ("embeds", "pooled", "time_ids", "guidance")
_DIGESTED = 64  # prompts that identify a set
_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


class CachedPrompts(SampleSource):
    """A source of prompts with their conditions, computed when first asked for and then read from disk.

    Samples hold "caption", "key" and one tensor for each field of the condition, without the batch dimension.

    Args:
        source: Gives captions; pictures are ignored.
        pipeline: Folder whose text encoders encode.
        folder: Where the cache lies.
        num_samples: How many; more than the source has means that captions are worded anew each time round.
        batch_size: Prompts encoded at once.
        latent_size: As for the task that trains on them; matters for SDXL only.
        half: Store in float16, half the size.
        in_memory: All of it in memory, in every process; otherwise prompts are read from disk one by one, each of 8 MB
            for FLUX, 5 MB for SD3.

    Raises:
        ValueError: The folder holds a cache made by something else.
    """

    def __init__(
        self,
        source: SampleSource,
        *,
        pipeline: str,
        folder: str,
        num_samples: int | None = None,
        batch_size: int = 32,
        latent_size: int | None = None,
        half: bool = False,
        in_memory: bool = True,
    ) -> None:
        count = len(source) if num_samples is None else num_samples
        root = find_pipeline(pipeline)
        fingerprint: dict[str, str | int | float | bool] = {
            "words": words_digest(root),
            "encoders": "-".join(digest(root / name) for name in _ENCODERS if (root / name).is_dir()),
            "source": type(source).__name__,
            "num_samples": count,
            "captions": _captions_digest(source, count),
            "latent_size": latent_size or 0,
            "half": half,
        }
        outline = open_outline(root)
        if isinstance(outline, StableDiffusionXLPipeline) and latent_size is None:  # told to it, in pixels
            fingerprint["image_size"] = latent_shape_of(outline)[1] * pixels_per_latent(outline)
        self._cache = CachedTensors.open_or_build(
            partial(_batches, source, count, batch_size),
            _Encode(pipeline, latent_size, half),
            folder,
            fingerprint=fingerprint,
            in_memory=in_memory,
        )

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self._cache)

    def sample(self, index: int, *, seed: int) -> dict[str, Any]:
        """One encoded prompt; the seed has no influence."""
        return self._cache.sample(index, seed=seed)


class _Encode:
    """Batch of captions to the fields of their condition; opens the pipeline only when a cache must be built."""

    def __init__(self, pipeline: str, latent_size: int | None, half: bool) -> None:
        self.pipeline, self.latent_size, self.half = pipeline, latent_size, half
        self.encoder: PromptEncoder | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        if self.encoder is None:
            pipe = open_pipeline(self.pipeline, text_only=True)
            _, h, w = latent_shape_of(pipe, self.latent_size)
            self.encoder = PromptEncoder(pipe, latent_size=(h, w))
        condition = self.encoder(batch["caption"], device=choose_device(None))
        fields = {name: getattr(condition, name) for name in CONDITION_FIELDS}
        tensors = {name: value for name, value in fields.items() if value is not None}
        return {name: value.half() if self.half else value for name, value in tensors.items()}


def condition_of_batch(batch: dict[str, Any]) -> Condition | None:
    """The condition stored in a batch of `CachedPrompts`, in float32; None where the prompts are not encoded yet."""
    if "embeds" not in batch:
        return None
    return Condition(**{name: batch[name].to(torch.float32) for name in CONDITION_FIELDS if name in batch})


def _captions_digest(source: SampleSource, count: int) -> str:
    """16 hex digits over keys and captions from all over a cache: a changed prompts file is another one."""
    total = hashlib.sha256(source.said().encode() if count > _DIGESTED else b"")
    seen = min(count, _DIGESTED)
    for place in (step * count // seen for step in range(seen)):
        sample = source.sample(place % len(source), seed=mix(place))
        total.update(f"{sample['key']}\n{sample['caption']}\n".encode())
    return total.hexdigest()[:16]


def _batches(source: SampleSource, count: int, batch_size: int, start: int = 0) -> Iterator[dict[str, Any]]:
    for first in range(start, count, batch_size):
        places = range(first, min(first + batch_size, count))
        samples = [source.sample(place % len(source), seed=mix(place)) for place in places]
        yield {"caption": [s["caption"] for s in samples], "key": [s["key"] for s in samples]}
