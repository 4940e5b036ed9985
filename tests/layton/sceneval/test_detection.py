from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw
from sceneval_degrade import blur, entirely_right, jpeg, noise, shrink

from layton.scenes import Scene, SceneObject, render, sample_scene
from layton.sceneval import find_objects

VALIDATION = 1_000_000_000
RED = (214, 26, 32)


def right_share(count: int, size: int, change: object = None, offset: int = 0) -> float:
    right = 0
    for seed in range(VALIDATION + offset, VALIDATION + offset + count):
        scene = sample_scene(seed)
        image = render(scene, size)
        right += entirely_right(scene, find_objects(image if change is None else change(image)))
    return right / count


@pytest.mark.parametrize(("size", "count"), [(64, 30), (128, 60), (256, 60), (512, 20), (1024, 10)])
def test_ground_truth_is_found(size: int, count: int) -> None:
    assert right_share(count, size) >= (0.99 if size >= 128 else 0.9)


@pytest.mark.parametrize("change", [jpeg, blur, lambda image: shrink(image, 4), lambda image: noise(image, 8, 0)])
def test_objects_are_found_in_spoilt_images(change: object) -> None:
    assert right_share(25, 256, change) >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("size", [128, 256, 512, 1024])
def test_bar_ground_truth(size: int) -> None:
    assert right_share(1000, size, offset=10_000) >= 0.99


@pytest.mark.slow
@pytest.mark.parametrize("change", [jpeg, blur])
def test_bar_spoilt_images(change: object) -> None:
    assert right_share(1000, 256, change, offset=20_000) >= 0.95


def scene_of(*objects: SceneObject, seed: int = 3) -> Scene:
    return replace(sample_scene(seed), objects=objects)


# Offsets of the second object, in diameters, at which two upright ones just meet (squares at a corner).
TOUCHING = {
    "circle": (0.99, 0.0),
    "square": (0.69, 0.69),
    "triangle": (0.86, 0.0),
    "star": (0.94, 0.0),
    "heart": (0.85, 0.0),
    "cross": (0.94, 0.0),
    "ring": (0.99, 0.0),
    "diamond": (0.61, 0.0),
}


@pytest.mark.parametrize("shape", TOUCHING)
def test_touching_objects_of_one_colour_are_told_apart(shape: str) -> None:
    dx, dy = TOUCHING[shape]
    objects = (
        SceneObject(shape, "blue", 0.35, 0.35, 0.3, 0.0),
        SceneObject(shape, "blue", 0.35 + 0.3 * dx, 0.35 + 0.3 * dy, 0.3, 0.0),
    )
    found = find_objects(render(scene_of(*objects), 256))
    assert [(f.shape, f.colour) for f in found] == [(shape, "blue")] * 2
    for seen, o in zip(sorted(found, key=lambda f: f.cx), objects, strict=True):
        assert seen.cx == pytest.approx(o.cx, abs=0.02)
        assert seen.diameter == pytest.approx(0.3, abs=0.03)


def test_a_small_object_touching_a_large_one_of_its_colour_is_not_swallowed() -> None:
    large, small = SceneObject("circle", "red", 0.4, 0.5, 0.35, 0.0), SceneObject("circle", "red", 0.63, 0.5, 0.12, 0.0)
    assert entirely_right(scene_of(large, small), find_objects(render(scene_of(large, small), 256)))


def test_a_partly_hidden_object_is_completed() -> None:
    hidden, front = (
        SceneObject("circle", "red", 0.4, 0.5, 0.3, 0.0),
        SceneObject("circle", "black", 0.635, 0.5, 0.22, 0.0),
    )
    found = {f.colour: f for f in find_objects(render(scene_of(hidden, front), 256))}
    assert found["red"].cx == pytest.approx(0.4, abs=0.01)
    assert found["red"].diameter == pytest.approx(0.3, abs=0.015)


def test_an_empty_background_has_no_objects() -> None:
    for seed in range(30):
        assert find_objects(render(replace(sample_scene(seed), objects=()), 128)) == []


def drawn(paint: object) -> np.ndarray:
    image = Image.new("RGB", (1024, 1024), (140, 150, 145))
    paint(ImageDraw.Draw(image))
    return np.asarray(image.resize((256, 256), Image.Resampling.BOX))


@pytest.mark.parametrize(
    "paint",
    [
        lambda d: d.ellipse([350, 430, 670, 590], fill=RED),
        lambda d: d.rectangle([350, 440, 670, 580], fill=RED),
        lambda d: d.chord([360, 360, 640, 640], 0, 180, fill=RED),
        lambda d: d.pieslice([360, 360, 640, 640], 40, 320, fill=RED),
        lambda d: d.arc([360, 360, 640, 640], 40, 320, fill=RED, width=64),
        lambda d: d.regular_polygon((512, 512, 150), 4, rotation=45, fill=RED),
        lambda d: d.regular_polygon((512, 512, 150), 3, rotation=180, fill=RED),
        lambda d: d.line([(350, 400), (500, 650), (680, 380)], fill=RED, width=60),
    ],
    ids=["ellipse", "bar", "half disc", "pacman", "open ring", "square on its tip", "triangle upside down", "tick"],
)
def test_other_shapes_are_nobody(paint: object) -> None:
    assert find_objects(drawn(paint)) == []


def test_a_colour_outside_the_palette_is_nobody() -> None:
    cyan = drawn(lambda d: d.ellipse([360, 360, 640, 640], fill=(0, 255, 255)))
    assert find_objects(cyan) == []


def test_noise_and_flat_images_do_not_break_it() -> None:
    rng = np.random.default_rng(0)
    for image in (rng.integers(0, 256, (256, 256, 3)), np.zeros((64, 64, 3)), np.full((64, 64, 3), 255)):
        assert find_objects(image.astype(np.uint8)) == []


def test_images_need_not_be_square() -> None:
    scene = scene_of(SceneObject("star", "red", 0.5, 0.4, 0.3, 5.0))
    image = render(scene, 200)[:160]
    (star,) = find_objects(image)
    assert (star.shape, star.colour) == ("star", "red")
    assert star.cx == pytest.approx(0.5, abs=0.01)
    assert star.cy == pytest.approx(0.4, abs=0.01)
    assert star.diameter == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("image", [np.zeros((64, 64)), np.zeros((64, 64, 3)), np.zeros((8, 8, 3), np.uint8)])
def test_what_is_no_image_is_refused(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8"):
        find_objects(image)
