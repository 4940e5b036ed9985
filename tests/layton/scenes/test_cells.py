from __future__ import annotations

from dataclasses import replace

import numpy as np

from layton.scenes import (
    AHEAD_SIZES,
    COLOURS,
    SHAPES,
    SHOWN_SIZES,
    Scene,
    SceneObject,
    begun_cells,
    object_cells,
    objects_ahead,
    objects_shown,
    render,
    sample_scene,
)


def test_cells_are_those_where_the_picture_shows_an_object() -> None:
    for seed in range(12):
        scene = sample_scene(seed)
        shown = np.abs(render(scene, 128).astype(int) - render(replace(scene, objects=()), 128)).max(-1) > 3
        seen = shown.reshape(16, 8, 16, 8).any(axis=(1, 3))
        assert (seen & ~object_cells(scene, 16)).sum() == 0
        assert object_cells(scene, 16).sum() - seen.sum() <= 3  # cells that an edge only grazes


def test_begun_cells_know_nothing_but_what_came_before() -> None:
    square = SceneObject("square", "red", 0.5, 0.5, 0.24, 0.0)
    scene: Scene = replace(sample_scene(0), objects=(square,))
    touched, begun = object_cells(scene, 8), begun_cells(scene, 8)
    assert np.argwhere(touched).tolist() == [[3, 3], [3, 4], [4, 3], [4, 4]]
    expected = [[3, 4], [3, 5], [4, 2], [4, 3], [4, 4], [4, 5], [5, 2], [5, 3], [5, 4], [5, 5]]
    assert np.argwhere(begun).tolist() == expected


def test_what_is_ahead_is_known_until_an_object_begins() -> None:
    square = SceneObject("square", "red", 0.5, 0.5, 0.24, 0.0)
    star = SceneObject("star", "blue", 0.2, 0.2, 0.2, 0.0)
    scene: Scene = replace(sample_scene(0), objects=(square, star))
    ahead = objects_ahead(scene, 8)
    begins = [int(np.flatnonzero(object_cells(replace(scene, objects=(one,)), 8)).min()) for one in (star, square)]
    assert begins[1] == 3 * 8 + 3
    answers = [(2, "star", "blue"), (1, "square", "red")]
    told = [[n, list(SHAPES).index(shape) + 1, list(COLOURS).index(colour) + 1] for n, shape, colour in answers]
    assert ahead[: begins[0] + 1].tolist() == [told[0]] * (begins[0] + 1)
    assert ahead[begins[0] + 1 : begins[1] + 1].tolist() == [told[1]] * (begins[1] - begins[0])
    assert not ahead[begins[1] + 1 :].any()
    assert objects_ahead(replace(scene, objects=(square, square)), 8)[begins[1]].tolist() == [2, *told[1][1:]]
    assert not objects_ahead(replace(scene, objects=()), 8).any()
    for seed in range(20):  # every answer is one that a head of these sizes can give
        assert (objects_ahead(sample_scene(seed), 16) < AHEAD_SIZES).all()


def test_what_is_shown_is_the_nearer_object_and_its_centre() -> None:
    square = SceneObject("square", "red", 0.5, 0.5, 0.24, 0.0)
    star = SceneObject("star", "blue", 0.9, 0.1, 0.2, 0.0)
    scene: Scene = replace(sample_scene(0), objects=(square, star))
    shown = objects_shown(scene, 8).reshape(8, 8, 3)
    red = [list(SHAPES).index("square") + 1, list(COLOURS).index("red") + 1]
    assert np.argwhere((shown[..., :2] == red).all(-1)).tolist() == [[3, 3], [3, 4], [4, 3], [4, 4]]
    assert shown[4, 4].tolist() == [*red, 1] and shown[3, 3].tolist() == [*red, 0]
    assert np.argwhere(shown[..., 2]).tolist() == [[0, 7], [4, 4]]
    assert ((shown[..., 0] > 0) == object_cells(scene, 8)).all()
    for seed in range(20):
        every = objects_shown(sample_scene(seed), 8)
        assert (every < SHOWN_SIZES).all()
        assert every[:, 2].sum() == len(sample_scene(seed).objects)
