"""The matcher's training task."""

from __future__ import annotations

import functools

import pytest
import torch

from distill.condition import Condition
from layton.data.sources import ScenesSource
from layton.distillation.matcher import Matcher
from layton.scenes.world import COLOURS, RELATIONS, SHAPES
from layton.tasks.matcher import MatcherTask

ADAM = functools.partial(torch.optim.AdamW, lr=3e-3)


class WordEncoder:
    """Each word a fixed random vector."""

    def __call__(self, captions) -> Condition:
        words = ["", *COLOURS, *SHAPES, *RELATIONS, "two", "three", "four", "five", "and", "left", "right"]
        words += [info.plural for info in SHAPES.values()]
        table = torch.randn(len(words), 16, generator=torch.Generator().manual_seed(0))
        rows = torch.zeros(len(captions), 10, 16)
        for i, text in enumerate(captions):
            for j, word in enumerate(text.split()[:10]):
                rows[i, j] = table[words.index(word) if word in words else 0]
        return Condition(embeds=rows)


def test_training_tells_true_captions_from_wrong_ones() -> None:
    torch.manual_seed(0)
    matcher = Matcher(size=32, widths=(16, 24, 32), text_width=16, text_length=10, text_depth=1, dim=32)
    task = MatcherTask(matcher=matcher, optimizer=ADAM, chinese=0.0)
    source = ScenesSource(split="train", length=12, size=32)
    samples = [source.sample(i, seed=0) for i in range(12)]
    batch = {
        "image": torch.stack([sample["image"] for sample in samples]),
        "key": [sample["key"] for sample in samples],
    }
    with pytest.raises(ValueError, match="no text encoder"):
        task.validation_step(batch, 0)
    task.attach(WordEncoder())
    optimizer = ADAM(task.trainable_parameters())
    first = task.validation_step(batch, 0).item()
    assert task.validation_step(batch, 0).item() == first
    for _ in range(25):
        optimizer.zero_grad()
        task.validation_step(batch, 0).backward()
        optimizer.step()
    assert task.validation_step(batch, 0).item() < 0.5 * first
    with pytest.raises(ValueError, match="photos-1/2"):
        task.validation_step({**batch, "key": ["photos-1/2"] * 12}, 0)
