from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from sceneval_changes import one_change
from sceneval_degrade import jpeg

from layton.scenes import TASKS, render, sample_scene
from layton.sceneval import (
    Exclusion,
    FoundObject,
    PromptSpec,
    Requirement,
    check,
    check_objects,
    find_objects,
    spec_of_scene,
)
from layton.sceneval.checker import relations_between

VALIDATION = 1_500_000_000
COLOURLESS = ("single_object", "two_object")


def accepted(count: int, size: int) -> tuple[Counter[str], Counter[str]]:
    """How many of the true scenes and of each change are accepted, and how many there were."""
    yes: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for i in range(count):
        scene = sample_scene(VALIDATION + i)
        spec = spec_of_scene(scene, coloured=scene.task not in COLOURLESS, swapped=bool(i % 2))
        for name, version in {"true": scene, **one_change(scene)}.items():
            total[name] += 1
            yes[name] += check(render(version, size), spec).correct
    return yes, total


def assert_bars(yes: Counter[str], total: Counter[str]) -> None:
    assert set(total) == {"true", "shape", "one less", "one more", "colours", "mirrored"}
    assert yes["true"] >= 0.99 * total["true"]
    for name in set(total) - {"true"}:
        assert yes[name] <= 0.03 * total[name], name


def test_true_scenes_pass_and_single_changes_do_not() -> None:
    assert_bars(*accepted(24, 128))


@pytest.mark.slow
@pytest.mark.parametrize("size", [128, 256, 512])
def test_bar_single_changes(size: int) -> None:
    assert_bars(*accepted(1000, size))


@pytest.mark.parametrize("task", TASKS)
def test_every_way_to_say_a_scene_is_true_of_it(task: str) -> None:
    for i in range(4):
        scene = sample_scene(VALIDATION + i, task=task)
        image = jpeg(render(scene, 256), 80)
        for coloured in (True, False):
            for swapped in (True, False):
                result = check(image, spec_of_scene(scene, coloured=coloured, swapped=swapped))
                assert result.correct, (scene, result.reasons)


def seen(shape: str, colour: str, cx: float, cy: float, score: float = 0.9) -> FoundObject:
    return FoundObject(shape, colour, cx, cy, 0.2, score)


def test_relations_follow_genevals_formula() -> None:
    centre = seen("ring", "red", 0.5, 0.5)
    assert relations_between(seen("star", "red", 0.2, 0.5), centre) == {"left of"}
    assert relations_between(seen("star", "red", 0.5, 0.8), centre) == {"below"}
    # (0.3 - 0.04) / 0.424 = 0.61 on both axes: two relations hold at once.
    assert relations_between(seen("star", "red", 0.8, 0.2), centre) == {"right of", "above"}
    # (0.07 - 0.04) / 0.07 = 0.43: too near to tell.
    assert relations_between(seen("star", "red", 0.57, 0.5), centre) == frozenset()
    assert relations_between(centre, centre) == frozenset()


def test_counts_colours_and_excludes() -> None:
    two_red = PromptSpec("counting", (Requirement("star", 2, "red"),), (Exclusion("star", 3),), "")
    stars = [seen("star", "red", 0.1 * i, 0.5) for i in range(4)]
    assert not check_objects(stars[:1], two_red).correct
    assert check_objects(stars[:2], two_red).correct
    assert check_objects(stars[:3], two_red).reasons == ("expected star<3, found 3",)
    blue = [stars[0], seen("star", "blue", 0.8, 0.5)]
    assert check_objects(blue, two_red).reasons == ("expected red star>=2, found red, blue",)


def test_the_best_scored_objects_are_taken_as_geneval_does() -> None:
    spec = PromptSpec("colors", (Requirement("star", 1, "red"),), (), "")
    red, blue = seen("star", "red", 0.2, 0.2, 0.9), seen("star", "blue", 0.8, 0.8, 0.8)
    assert check_objects([red, blue], spec).correct
    assert not check_objects([blue, red], spec).correct


def test_a_wrong_place_is_explained() -> None:
    spec = PromptSpec("position", (Requirement("ring", 1), Requirement("star", 1, None, "left of", 0)), (), "")
    found = [seen("ring", "red", 0.3, 0.5), seen("star", "red", 0.8, 0.5)]
    assert check_objects(found, spec).reasons == ("expected star left of ring, found it right of",)
    assert check_objects([found[1]], spec).reasons == ("expected ring>=1, found 0",)


def test_directions_in_an_oblong_picture_are_those_one_sees() -> None:
    """A circle 150 pixels to the right of a square and 75 below it, in 512 x 256: to the right, and not below."""
    image = np.full((256, 512, 3), 255, np.uint8)
    image[50:110, 100:160] = (220, 30, 30)
    y, x = np.mgrid[:256, :512]
    image[np.hypot(x - 280, y - 155) < 30] = (30, 60, 220)
    found = {item.shape: item for item in find_objects(image)}
    assert found["circle"].cx == pytest.approx(280 / 512, abs=0.01)
    assert found["circle"].cy == pytest.approx(155 / 512, abs=0.01)
    assert relations_between(found["circle"], found["square"]) == {"right of"}
