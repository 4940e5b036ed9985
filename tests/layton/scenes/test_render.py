from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from layton.scenes import COLOURS, SHAPES, Scene, SceneObject, coverage, render, sample_scene
from layton.scenes.render import coverage_at

TEST = 2_000_000_000


@pytest.mark.parametrize("size", [64, 128, 200, 256, 1024])
def test_any_size_gives_uint8_rgb(size: int) -> None:
    image = render(sample_scene(TEST), size)
    assert image.shape == (size, size, 3)
    assert image.dtype == np.uint8


def test_rendering_is_deterministic() -> None:
    scene = sample_scene(TEST + 1)
    assert np.array_equal(render(scene, 128), render(scene, 128))


@pytest.mark.parametrize("seed", range(12))
def test_a_scene_looks_the_same_at_every_resolution(seed: int) -> None:
    scene = sample_scene(TEST + seed)
    large = render(scene, 512).astype(np.float64)
    reduced = large.reshape(128, 4, 128, 4, 3).mean((1, 3))
    difference = np.abs(render(scene, 128) - reduced)
    assert difference.mean() < 0.6
    assert np.quantile(difference, 0.999) < 25


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_equals_supersampling(shape: str) -> None:
    size, factor, place = 40, 16, (19.3, 20.8, 15.6, 11.0)
    fine = np.arange(size * factor, dtype=np.float32) / factor + np.float32(0.5 / factor)
    dots = coverage_at(shape, fine[None], fine[:, None], *place, edge=1e-3) > 0.5
    exact = dots.reshape(size, factor, size, factor).mean((1, 3))
    drawn = coverage(shape, *place, size, size)
    assert abs(drawn.sum() / exact.sum() - 1) < 0.005
    assert np.abs(drawn - exact).mean() < 0.006
    assert np.abs(drawn - exact).max() < 0.35  # at tips


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_fills_its_circle_and_stays_inside(shape: str) -> None:
    size, radius = 300, 140.0
    drawn = coverage(shape, size / 2, size / 2, radius, 0.0, size, size) > 0.5
    y, x = np.nonzero(drawn)
    reach = np.hypot(x + 0.5 - size / 2, y + 0.5 - size / 2).max()
    assert radius - 2 < reach < radius + 1


def test_sub_pixel_moves_move_the_centroid() -> None:
    for dx in (0.0, 0.1, 0.25, 0.6):
        drawn = coverage("circle", 16 + dx, 16, 9.0, 0.0, 32, 32)
        centroid = float((drawn.sum(0) * (np.arange(32) + 0.5)).sum() / drawn.sum())
        assert centroid == pytest.approx(16 + dx, abs=1e-2)


def test_rotation_is_counter_clockwise_and_y_is_down() -> None:
    upright = coverage("triangle", 32, 32, 24, 0.0, 64, 64)
    assert upright[14, 32] == 1 and upright[50, 32] == 0  # tip above
    turned = coverage("triangle", 32, 32, 24, 90.0, 64, 64)
    assert turned[32, 14] == 1 and turned[32, 50] == 0  # tip to the left


def test_inside_is_the_palette_colour_and_later_objects_cover_earlier_ones() -> None:
    base = sample_scene(TEST)
    below = SceneObject("square", "red", 0.5, 0.5, 0.35, 0.0)
    above = SceneObject("circle", "white", 0.5, 0.5, 0.12, 0.0)
    image = render(replace(base, objects=(below, above)), 128)
    assert tuple(image[64, 64]) == COLOURS["white"]
    assert tuple(image[64, 76]) == COLOURS["red"]


def test_backgrounds_stay_soft_and_away_from_every_colour() -> None:
    for seed in range(60):
        empty = Scene("colors", (), sample_scene(TEST + seed).background, seed)
        image = render(empty, 64).astype(np.float64)
        steps = max(np.abs(np.diff(image, axis=0)).max(), np.abs(np.diff(image, axis=1)).max())
        assert steps <= 16
        for rgb in COLOURS.values():
            assert np.linalg.norm(image - rgb, axis=-1).min() > 60


def test_size_out_of_range_is_named() -> None:
    with pytest.raises(ValueError, match="100000"):
        render(sample_scene(1), 100_000)


def test_an_object_beyond_the_frame_is_cut_off_not_an_error() -> None:
    scene = replace(sample_scene(1), objects=(SceneObject("star", "red", -1.0, 0.5, 0.2, 0.0),))
    assert np.array_equal(render(scene, 64), render(replace(scene, objects=()), 64))


@pytest.mark.slow
def test_drawing_takes_two_milliseconds_at_256() -> None:
    scenes = [sample_scene(i) for i in range(100)]
    times = []
    for scene in scenes:
        start = time.perf_counter()
        render(scene, 256)
        times.append(time.perf_counter() - start)
    assert float(np.median(times)) < 2e-3
