"""The distortions that teach the perceptual network, and its targets."""

from __future__ import annotations

import pytest
import torch

from layton.data.sources import ScenesSource
from layton.tasks.distortion import WORDS, word_targets
from layton.tasks.perceptual import DISTORTIONS


@pytest.mark.parametrize("distort", DISTORTIONS, ids=lambda f: f.__name__)
def test_distortion_keeps_the_shape_is_repeatable_and_grows(distort) -> None:
    image = ScenesSource(split="train", length=3, size=96)[2]["image"]

    def error(strength: float) -> float:
        damaged = distort(image, strength, torch.Generator().manual_seed(3))
        assert damaged.shape == image.shape and torch.isfinite(damaged).all()
        assert torch.equal(damaged, distort(image, strength, torch.Generator().manual_seed(3)))
        return (damaged - image).square().mean().item()

    assert 0 < error(0.05) < error(1.0)


def test_words_are_known_for_english_scenes_only() -> None:
    captions = ["two red stars", "a goldfish", "一个红色的圆环"]
    keys = ["scenes/1", "photos-0000/5", "scenes/2"]
    present, known = word_targets(captions, keys, torch.device("cpu"))
    assert known.tolist() == [1.0, 0.0, 0.0]
    assert {WORDS[i] for i in present[0].nonzero().flatten().tolist()} == {"red", "star"}
