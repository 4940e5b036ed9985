from __future__ import annotations

import itertools

import pytest

from layton.scenes import (
    COLOURS,
    SHAPES,
    TASKS,
    is_unseen,
    sample_scene,
    scene_key,
    seed_of_key,
    split_of_seed,
    split_seeds,
)
from layton.scenes.captions import NUMBERS, noun_phrase
from layton.scenes.splits import is_unseen_caption

BILLION = 1_000_000_000


def test_borders_of_the_splits() -> None:
    seeds = (0, BILLION - 1, BILLION, 2 * BILLION - 1, 2 * BILLION, 10**12)
    assert [split_of_seed(s) for s in seeds] == ["train", "train", "validation", "validation", "test", "test"]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_split_seeds_belong_to_their_split(split: str) -> None:
    seeds = split_seeds(split, 5, offset=3)
    assert len(seeds) == 5
    assert {split_of_seed(s) for s in seeds} == {split}


def test_ranges_that_leave_a_split_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        split_seeds("train", 2, offset=BILLION - 1)
    with pytest.raises(ValueError, match="holdout"):
        split_seeds("holdout", 2)
    with pytest.raises(ValueError, match="-5"):
        split_of_seed(-5)


def test_training_seeds_never_show_an_unseen_combination() -> None:
    for task in TASKS:
        assert not any(is_unseen(sample_scene(seed, task=task)) for seed in range(400))


@pytest.mark.parametrize("start", [BILLION, 2 * BILLION])
def test_the_other_splits_draw_freely(start: int) -> None:
    share = sum(is_unseen(sample_scene(start + i)) for i in range(1500)) / 1500
    assert 0.06 < share < 0.14


def test_one_combination_in_ten_is_unseen() -> None:
    singles = [noun_phrase(s, c) for s in SHAPES for c in COLOURS]
    counts = [noun_phrase(s, c, n) for s in SHAPES for c in COLOURS for n in range(2, len(NUMBERS))]
    pairs = [f"{a} left of {b}" for a, b in itertools.permutations(singles, 2)]
    assert sum(map(is_unseen_caption, singles)) == 8
    assert sum(map(is_unseen_caption, counts)) == 31
    assert 0.09 <= sum(map(is_unseen_caption, pairs)) / len(pairs) <= 0.11


def test_every_shape_and_colour_is_seen_alone() -> None:
    # Otherwise "unseen" would test words the model never met instead of combinations.
    for shape in SHAPES:
        assert any(not is_unseen_caption(noun_phrase(shape, c)) for c in COLOURS)
    for colour in COLOURS:
        assert any(not is_unseen_caption(noun_phrase(s, colour)) for s in SHAPES)


def test_the_hash_is_the_same_on_every_machine() -> None:
    unseen = [noun_phrase(s, c) for s in SHAPES for c in COLOURS if is_unseen_caption(noun_phrase(s, c))]
    assert unseen == [
        "an orange circle",
        "a brown triangle",
        "a yellow star",
        "a purple star",
        "a yellow heart",
        "a red cross",
        "a brown cross",
        "a black ring",
    ]


def test_keys_of_scenes_tell_their_seeds() -> None:
    assert seed_of_key(scene_key(2_000_000_007)) == 2_000_000_007
    for key in ("photos/12", "scenes/", "scenes/x", "scenes/-1", "scene/colors/3", "scenes/\u0662", "12"):
        assert seed_of_key(key) is None
