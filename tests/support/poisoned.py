"""Jobs with inputs that end, or fail, whatever encodes them; made anew in other processes."""

from __future__ import annotations

import os
import signal

from laytongen_parts import tiny_tokenizer

from generation.tokenizing import TokenizeJob
from layton.data.sources import ScenesSource
from layton.data.types import ImageSample

CRASHES, FAILS = 5, 8


class PoisonedScenes(ScenesSource):
    """Ends the process at one index, and raises what nobody expects at another."""

    def sample(self, index: int, *, seed: int) -> ImageSample:
        if index == CRASHES and os.environ["POISON"] == "some":
            os.kill(os.getpid(), signal.SIGSEGV)
        if index == FAILS or os.environ["POISON"] == "all":
            raise RuntimeError("a bug of a decoder")
        return super().sample(index, seed=seed)


def poisoned_job() -> TokenizeJob:
    """12 scenes, two of which do harm."""
    tokenizer = tiny_tokenizer()
    source = PoisonedScenes(split="train", length=12, size=tokenizer.image_size)
    return TokenizeJob(source, tokenizer, "scenes", shard_size=10, batch_size=3)
