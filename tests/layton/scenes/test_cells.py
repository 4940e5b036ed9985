from __future__ import annotations

from dataclasses import replace

import numpy as np

from layton.scenes import Scene, SceneObject, begun_cells, object_cells, render, sample_scene


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
