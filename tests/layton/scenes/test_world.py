from __future__ import annotations

import itertools
import math

from layton.scenes import COLOURS, SHAPES, TASKS


def test_the_world_is_eight_shapes_ten_colours_six_tasks() -> None:
    assert (len(SHAPES), len(COLOURS), len(TASKS)) == (8, 10, 6)
    geneval = {"red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"}
    assert set(COLOURS) == geneval


def test_colours_are_well_apart() -> None:
    assert min(math.dist(a, b) for a, b in itertools.combinations(COLOURS.values(), 2)) >= 90


def test_no_shape_turns_into_itself_or_into_another() -> None:
    for info in SHAPES.values():
        assert 2 * info.max_rotation <= max(info.symmetry, 0)  # each pose has one name
    assert SHAPES["square"].max_rotation < 22.5  # nearer to a square than to a diamond
