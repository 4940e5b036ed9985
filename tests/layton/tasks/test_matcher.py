"""Wrong captions, and the matcher's training task."""

from __future__ import annotations

import functools
import random

import pytest
import torch

from distill.condition import Condition
from layton.data.sources import ScenesSource
from layton.distillation.matcher import Matcher
from layton.scenes import TASKS, sample_scene
from layton.scenes.world import COLOURS, RELATIONS, SHAPES
from layton.tasks.matcher import MatcherTask
from layton.tasks.matcher_captions import CHANGES, altered, captions_of

ADAM = functools.partial(torch.optim.AdamW, lr=3e-3)


def facts(scene) -> dict[str, object]:
    """What a scene's caption says, one entry for each kind of change."""
    return {
        "count": len(scene.objects),
        "colour": [item.colour for item in scene.objects],
        "shape": [item.shape for item in scene.objects],
        "relation": scene.relation,
    }


@pytest.mark.parametrize("task", TASKS)
def test_exactly_one_thing_is_changed(task) -> None:
    applied = set()
    for seed in range(30):
        scene, rng = sample_scene(seed, task=task), random.Random(seed)
        for change in CHANGES:
            other = altered(scene, change, rng)
            if other is None:
                continue
            applied.add(change)
            before, after = facts(scene), facts(other)
            if change == "count":  # one kind of object: the lists grow or shrink with it
                both = (before, after)
                before, after = ({k: v[:1] if isinstance(v, list) else v for k, v in d.items()} for d in both)
            assert [key for key in before if before[key] != after[key]] == [change]
            if change == "shape":
                new = set(after["shape"]) - set(before["shape"])
                assert len(new) == 1
            if change == "colour" and len(set(before["colour"])) == 2:
                assert after["colour"] == before["colour"][::-1]
    one_kind = task in ("single_object", "colors", "counting")
    assert applied == {"colour", "shape"} | ({"count"} if one_kind else set()) | (
        {"relation"} if task == "position" else set()
    )


def test_captions_differ_from_the_true_one_and_are_worded_alike() -> None:
    for seed in range(200):
        said = captions_of(sample_scene(seed), random.Random(seed), chinese=0.2)
        assert said == captions_of(sample_scene(seed), random.Random(seed), chinese=0.2)
        assert said.wrong and said.true not in said.wrong.values()
        prefixed = said.true.startswith("a photo of ")
        assert all(text.startswith("a photo of ") == prefixed for text in said.wrong.values())


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
