"""Lay out scenes: what is shown, how large, and where, as a pure function of the seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Final, get_args

import numpy as np

from layton.scenes.splits import SPLIT_STRIDE, Split, is_unseen, split_of_seed, split_seeds
from layton.scenes.world import (
    COLOURS,
    MAX_DIAMETER,
    MAX_OBJECTS,
    MIN_DIAMETER,
    RELATIONS,
    RGB,
    SHAPES,
    TASKS,
    Background,
    Colour,
    Relation,
    Scene,
    SceneObject,
    Shape,
    Task,
    Texture,
)

_SHAPE_NAMES: Final = tuple(SHAPES)
_COLOUR_NAMES: Final = tuple(COLOURS)
_MARGIN: Final = 0.01  # between an object's circle and the frame
_GAP: Final = 0.015  # between two objects' circles when they must not touch
_TOUCHING_SHARE: Final = 0.3  # of the scenes with several objects
# Part of the smaller circle that the other circle may hide. A ring or a heart fills 72 % of its circle up to the
# rim, so 7 % of the circle keeps the promise of 10 % of the shape; pointed shapes stay further below.
_CIRCLE_OVERLAP: Final = 0.07
_LARGEST: Final = {1: MAX_DIAMETER, 2: MAX_DIAMETER, 3: 0.32, 4: 0.29, 5: 0.26}
_ASPECT: Final = 1.8  # a relation's axis is at least this much longer than the other one
_TEXTURES: Final[tuple[Texture, ...]] = get_args(Texture)

_Circle = tuple[float, float, float]  # cx, cy, diameter


def sample_scene(seed: int, *, task: Task | None = None) -> Scene:
    """Draw a scene.

    Args:
        seed: >= 0; also decides the split (``layton.scenes.splits``). For a training seed the attributes are drawn
            again, from the same stream, until their combination is one that training may see.
        task: one of GenEval's six tasks, or None to draw it too.

    Returns:
        The scene: 1 to 5 objects inside the frame, diameters 12 to 35 % of the side, overlap at most 10 %.

    Raises:
        ValueError: if ``seed`` is negative or ``task`` is unknown.
    """
    training = split_of_seed(seed) == "train"
    if task is not None and task not in TASKS:
        raise ValueError(f"task must be one of {TASKS}, got {task!r}")
    rng = np.random.default_rng(seed)
    background = _background(rng)
    drawn = TASKS[rng.integers(len(TASKS))]
    task = drawn if task is None else task
    while True:
        attributes, relation = _attributes(rng, task)
        outline = tuple(SceneObject(shape, colour, 0.5, 0.5, MAX_DIAMETER, 0.0) for shape, colour in attributes)
        scene = Scene(task, outline, background, seed, relation)
        if not (training and is_unseen(scene)):
            break
    circles = _place(rng, len(attributes), relation)
    objects = []
    for (shape, colour), (cx, cy, diameter) in zip(attributes, circles, strict=True):
        limit = SHAPES[shape].max_rotation
        objects.append(SceneObject(shape, colour, cx, cy, diameter, float(rng.uniform(-limit, limit))))
    return Scene(task, tuple(objects), background, seed, relation)


def textured_seeds(split: Split, count: int, textures: Sequence[Texture], *, offset: int = 0) -> list[int]:
    """The first ``count`` seeds of a split, ``offset`` passed over, whose backgrounds have one of some textures.

    Raises:
        ValueError: If a texture is unknown, or none is named.
    """
    check_textures(textures)
    seeds = split_seeds(split, SPLIT_STRIDE - offset, offset=offset)
    return list(islice((seed for seed in seeds if texture_of(seed) in textures), count))


def texture_of(seed: int) -> Texture:
    """Texture of the background of `sample_scene`'s scene for a seed >= 0; the rest is not drawn."""
    return _background(np.random.default_rng(seed)).texture


def check_textures(textures: Sequence[Texture]) -> None:
    """Refuse unknown textures, and none at all.

    Raises:
        ValueError: With what was given.
    """
    if not textures or isinstance(textures, str) or not set(textures) <= set(_TEXTURES):
        raise ValueError(f"textures must be some of {', '.join(_TEXTURES)}, got {textures!r}")


def _attributes(rng: np.random.Generator, task: Task) -> tuple[list[tuple[Shape, Colour]], Relation | None]:
    """Shapes and colours of a task's objects, and the relation of the second to the first."""
    if task in ("single_object", "colors", "counting"):
        count = int(rng.integers(2, MAX_OBJECTS + 1)) if task == "counting" else 1
        shape = _SHAPE_NAMES[rng.integers(len(_SHAPE_NAMES))]
        colour = _COLOUR_NAMES[rng.integers(len(_COLOUR_NAMES))]
        return [(shape, colour)] * count, None
    a, b = rng.choice(len(_SHAPE_NAMES), 2, replace=False)  # two classes, as in GenEval
    # Attribution is only a question when the colours differ.
    c, d = rng.choice(len(_COLOUR_NAMES), 2, replace=task != "color_attr")
    relation = RELATIONS[rng.integers(len(RELATIONS))] if task == "position" else None
    return [(_SHAPE_NAMES[a], _COLOUR_NAMES[c]), (_SHAPE_NAMES[b], _COLOUR_NAMES[d])], relation


def _place(rng: np.random.Generator, count: int, relation: Relation | None) -> list[_Circle]:
    """Places and sizes that satisfy the frame, the overlap and the relation."""
    touching = bool(rng.random() < _TOUCHING_SHARE)
    largest = _LARGEST[count]
    while True:
        diameters = rng.uniform(MIN_DIAMETER, largest, count)
        for _ in range(12):
            circles = _try_places(rng, diameters, touching)
            if circles is not None and (relation is None or _stands(circles, relation)):
                return circles
        largest = max(largest * 0.95, MIN_DIAMETER)  # smaller objects always fit in the end


def _try_places(rng: np.random.Generator, diameters: np.ndarray, touching: bool) -> list[_Circle] | None:
    circles: list[_Circle] = []
    for diameter in diameters.tolist():
        low = diameter / 2 + _MARGIN
        for _ in range(12):
            cx, cy = rng.uniform(low, 1 - low, 2).tolist()
            if all(_apart((cx, cy, diameter), other, touching) for other in circles):
                circles.append((cx, cy, diameter))
                break
        else:
            return None
    return circles


def _apart(a: _Circle, b: _Circle, touching: bool) -> bool:
    distance = math.hypot(a[0] - b[0], a[1] - b[1])
    if distance >= (a[2] + b[2]) / 2 + _GAP:
        return True
    return touching and circle_overlap(distance, a[2] / 2, b[2] / 2) <= _CIRCLE_OVERLAP


def circle_overlap(distance: float, r: float, s: float) -> float:
    """Area that two discs of radii ``r`` and ``s`` share, as a fraction of the smaller disc."""
    if distance >= r + s:
        return 0.0
    if distance <= abs(r - s):
        return 1.0
    u = (distance**2 + r**2 - s**2) / (2 * distance)
    lens = r**2 * math.acos(u / r) - u * math.sqrt(r**2 - u**2)
    v = distance - u
    lens += s**2 * math.acos(v / s) - v * math.sqrt(s**2 - v**2)
    return lens / (math.pi * min(r, s) ** 2)


def _stands(circles: list[_Circle], relation: Relation) -> bool:
    """Whether the second circle clearly stands in ``relation`` to the first, and in no other.

    GenEval's rule asks that the offset less a tenth of both extents exceeds half the distance of the centres; it is
    asked here of the circles, which are never smaller than the shapes.
    """
    (ax, ay, da), (bx, by, db) = circles[0], circles[1]
    dx, dy = bx - ax, by - ay
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    if relation in ("left of", "above"):
        along = -along
    clear = along - 0.1 * (da + db) > 0.55 * math.hypot(dx, dy)
    return clear and along >= _ASPECT * abs(across)


def as_position(scene: Scene) -> Scene | None:
    """A scene of two objects, told as one of position: "a red star left of a blue ring" instead of "... and ...".

    Returns:
        The scene with its relation; None if there are not two objects, none of GenEval's relations is clear, or its
        seed is for training and the combination it would then name is kept out of training.
    """
    if scene.relation is not None:
        return scene
    if len(scene.objects) != 2 or scene.objects[0].shape == scene.objects[1].shape:
        return None
    circles = [(item.cx, item.cy, item.diameter) for item in scene.objects]
    for relation in RELATIONS:
        if _stands(circles, relation):
            told = replace(scene, task="position", relation=relation)
            return None if split_of_seed(scene.seed) == "train" and is_unseen(told) else told
    return None


def _background(rng: np.random.Generator) -> Background:
    """Mid-grey with a light tint: far from black and white, and far less saturated than any object colour."""
    texture = _TEXTURES[rng.integers(len(_TEXTURES))]
    return Background(
        start=_soft_colour(rng),
        end=_soft_colour(rng),
        gradient="linear" if rng.random() < 0.6 else "radial",
        angle=float(rng.uniform(0, 360)),
        texture=texture,
        amplitude=float(rng.uniform(2, 5)),
        frequency=int(rng.integers(6, 25)),
        seed=int(rng.integers(2**31)),
    )


def _soft_colour(rng: np.random.Generator) -> RGB:
    grey, tint = rng.uniform(118, 178), rng.uniform(-20, 20, 3)
    r, g, b = (round(float(v)) for v in grey + tint - tint.mean())
    return r, g, b
