from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from layton.scenes import COLOURS, SHAPES, TASKS, Scene, as_position, coverage, is_unseen, sample_scene, textured_seeds
from layton.scenes.layout import circle_overlap

TEST = 2_000_000_000
KNOWN = (
    ("two_object", None),
    [("star", "purple"), ("ring", "purple")],
    [0.831362, 0.307068, 0.302312, -16.418088, 0.256406, 0.58068, 0.263101, 0.0],
)
SCENES = [sample_scene(TEST + i) for i in range(300)]


def test_a_scene_is_a_pure_function_of_its_seed() -> None:
    assert [sample_scene(s.seed) for s in SCENES[:50]] == SCENES[:50]
    assert len({s.objects for s in SCENES}) == len(SCENES)


def test_a_seed_keeps_its_scene_for_ever() -> None:
    # Trained weights, prompts files and reported figures all refer to seeds.
    scene = sample_scene(7)
    assert (scene.task, scene.relation) == KNOWN[0]
    assert [(o.shape, o.colour) for o in scene.objects] == KNOWN[1]
    assert [round(v, 6) for o in scene.objects for v in (o.cx, o.cy, o.diameter, o.rotation)] == KNOWN[2]


def test_sizes_frame_and_rotation() -> None:
    for scene in SCENES:
        assert 1 <= len(scene.objects) <= 5
        for o in scene.objects:
            assert 0.12 <= o.diameter <= 0.35
            assert o.diameter / 2 <= min(o.cx, o.cy, 1 - o.cx, 1 - o.cy)
            assert abs(o.rotation) <= SHAPES[o.shape].max_rotation


def test_at_most_a_tenth_of_a_shape_is_hidden_and_some_do_touch() -> None:
    size, hidden = 256, []
    for scene in SCENES:
        if len(scene.objects) < 2 or not _circles_meet(scene):
            continue
        drawn = [
            coverage(o.shape, o.cx * size, o.cy * size, o.diameter / 2 * size, o.rotation, size, size)
            for o in scene.objects
        ]
        for a, b in itertools.combinations(drawn, 2):
            hidden.append(float(np.minimum(a, b).sum() / min(a.sum(), b.sum())))
    assert max(hidden) <= 0.10
    assert sum(h > 0.001 for h in hidden) >= 1


def _circles_meet(scene: Scene) -> bool:
    return any(
        math.hypot(a.cx - b.cx, a.cy - b.cy) < (a.diameter + b.diameter) / 2
        for a, b in itertools.combinations(scene.objects, 2)
    )


@pytest.mark.parametrize("task", TASKS)
def test_tasks_show_what_they_are_about(task: str) -> None:
    for i in range(60):
        scene = sample_scene(TEST + i, task=task)
        shapes, colours = [o.shape for o in scene.objects], [o.colour for o in scene.objects]
        assert scene.task == task
        assert (scene.relation is not None) == (task == "position")
        if task in ("single_object", "colors"):
            assert len(shapes) == 1
        elif task == "counting":
            assert 2 <= len(shapes) <= 5
            assert len(set(zip(shapes, colours, strict=True))) == 1
        else:
            assert len(set(shapes)) == 2
        if task == "color_attr":
            assert len(set(colours)) == 2


def test_relations_are_clear_by_genevals_rule_and_lean_to_one_axis() -> None:
    seen = set()
    for i in range(100):
        scene = sample_scene(TEST + i, task="position")
        a, b = scene.objects
        dx, dy = b.cx - a.cx, b.cy - a.cy
        slack, distance = 0.1 * (a.diameter + b.diameter), math.hypot(dx, dy)
        holds = {
            "left of": dx + slack < -0.5 * distance,
            "right of": dx - slack > 0.5 * distance,
            "above": dy + slack < -0.5 * distance,
            "below": dy - slack > 0.5 * distance,
        }
        assert [name for name, yes in holds.items() if yes] == [scene.relation]
        seen.add(scene.relation)
    assert len(seen) == 4


def test_two_objects_are_told_by_their_relation_only_where_it_is_clear_and_may_be_trained_on() -> None:
    told = {}
    for seed in range(600):
        scene = sample_scene(seed)
        other = as_position(scene)
        if scene.relation is not None:
            assert other == scene
        elif len(scene.objects) != 2:
            assert other is None
        elif other is not None:
            a, b = other.objects
            assert other.objects == scene.objects and other.task == "position" and not is_unseen(other)
            assert {"left of": b.cx < a.cx, "right of": b.cx > a.cx, "above": b.cy < a.cy, "below": b.cy > a.cy}[
                other.relation or ""
            ]
            told[seed] = other.relation
    assert len(set(told.values())) == 4 and len(told) > 60
    validation = [as_position(sample_scene(1_000_000_000 + i, task="two_object")) for i in range(300)]
    assert any(is_unseen(scene) for scene in validation if scene is not None)  # only training leaves them out


def test_every_shape_and_colour_occurs_about_equally_often() -> None:
    objects = [o for s in (sample_scene(i, task="single_object") for i in range(1600)) for o in s.objects]
    for name in SHAPES:
        assert 0.08 < sum(o.shape == name for o in objects) / len(objects) < 0.17
    for name in COLOURS:
        assert 0.06 < sum(o.colour == name for o in objects) / len(objects) < 0.14


def test_circle_overlap_known_answers() -> None:
    assert circle_overlap(2.0, 1.0, 1.0) == 0
    assert circle_overlap(0.1, 2.0, 1.0) == 1
    # Two unit discs at distance 1 share 2 pi / 3 - sqrt(3) / 2.
    assert circle_overlap(1.0, 1.0, 1.0) == pytest.approx((2 * math.pi / 3 - math.sqrt(3) / 2) / math.pi)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="-1"):
        sample_scene(-1)
    with pytest.raises(ValueError, match="juggling"):
        sample_scene(1, task="juggling")


def test_seeds_are_chosen_by_their_backgrounds_in_order() -> None:
    chosen = textured_seeds("test", 40, ["plain", "noise"], offset=5)
    wanted = [s for s in range(TEST + 5, TEST + 400) if sample_scene(s).background.texture in ("plain", "noise")]
    assert chosen == wanted[:40]
    for textures in ([], ["plain", "fur"], "plain"):
        with pytest.raises(ValueError, match="textures must be some of plain, stripes, checks, noise"):
            textured_seeds("test", 1, textures)  # type: ignore[arg-type]
