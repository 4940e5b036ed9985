"""Prompts with places: what is said is where it stands."""

from __future__ import annotations

import re

import pytest

from layton.data.sources import ScenesSource
from layton.scenes import sample_scene
from layton.scenes.placed import DIAMETER_TOKENS, DIAMETERS, GRID, SQUARE_TOKENS, placed_caption, placed_phrase


def test_a_placed_caption_says_where_each_object_stands() -> None:
    for seed in range(60):
        scene = sample_scene(seed)
        phrases = placed_caption(scene).split(", ")
        assert len(phrases) == len(scene.objects)
        for phrase, item in zip(phrases, scene.objects, strict=True):
            colour, shape, size, square = phrase.split()
            assert (colour, shape) == (item.colour, item.shape)
            assert DIAMETER_TOKENS[size] == pytest.approx(item.diameter, abs=0.0051)
            x, y = SQUARE_TOKENS[square]
            assert max(abs(x - item.cx), abs(y - item.cy)) <= 0.5 / GRID + 1e-9


def test_corners_have_the_names_of_a_board() -> None:
    assert placed_phrase("star", "red", 0.0, 0.0, 0.24) == "red star <24> <a1>"
    assert placed_phrase("star", "red", 1.0, 1.0, 2.0) == f"red star <{DIAMETERS[-1]}> <p16>"
    with pytest.raises(ValueError, match=re.escape("(1.5, 0.2)")):
        placed_phrase("star", "red", 1.5, 0.2, 0.2)


def test_a_share_of_the_captions_of_scenes_is_placed() -> None:
    source = ScenesSource(length=400, places=0.3, chinese=0.5)
    said = [source.caption(index, seed=index) for index in range(400)]
    assert sum("<" in caption for caption in said) / 400 == pytest.approx(0.3, abs=0.07)
    plain = ScenesSource(length=400, chinese=0.5)
    assert all(a == plain.caption(i, seed=i) for i, a in enumerate(said) if "<" not in a)
    with pytest.raises(ValueError, match="places"):
        ScenesSource(length=4, places=1.5)
