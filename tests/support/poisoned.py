"""Jobs with inputs that end, or fail, whatever encodes them; made anew in other processes."""

from __future__ import annotations

import os
import signal

from laytongen_parts import tiny_tokenizer
from torch import Tensor

from generation.data.tokenizing import TokenizeJob
from layton.data.sources import ScenesSource
from layton.data.types import ImageSample

CRASHES, FAILS = 5, 8


class PoisonedScenes(ScenesSource):
    """Ends the process at one index, and raises what nobody expects at another."""

    def sample(self, index: int, *, seed: int) -> ImageSample:
        if index == CRASHES and os.environ["POISON"] == "some":
            os.kill(os.getpid(), signal.SIGSEGV)
        if index == FAILS:
            raise RuntimeError("a bug of a decoder")
        if os.environ["POISON"] == "disk":
            raise PermissionError("the disk is gone")
        return super().sample(index, seed=seed)


class PoisonedJob(TokenizeJob):
    """Has an encoder that may be broken."""

    def encode(self, images: Tensor) -> Tensor:
        if os.environ["POISON"] == "encoder":
            raise RuntimeError("a bug of the encoder")
        return super().encode(images)


def poisoned_job() -> TokenizeJob:
    """12 scenes, two of which do harm."""
    tokenizer = tiny_tokenizer()
    source = PoisonedScenes(split="train", length=12, size=tokenizer.image_size)
    return PoisonedJob(source, tokenizer, "scenes", shard_size=10, batch_size=3)
