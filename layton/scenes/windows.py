"""Windows of a scene's grid that show one whole object and no part of another."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from layton.scenes.splits import is_unseen
from layton.scenes.world import Scene, SceneObject


@dataclass(frozen=True, slots=True)
class ObjectWindow:
    """A square of a grid laid over a scene.

    Attributes:
        scene: The scene with this object alone, as a caption of the window needs it.
        top: First row.
        left: First column.
        side: Rows and columns.
    """

    scene: Scene
    top: int
    left: int
    side: int


def object_windows(scene: Scene, *, grid: int, side: int) -> list[ObjectWindow]:
    """Every window of ``side`` x ``side`` cells, of ``grid`` x ``grid``, around one object.

    Windows whose one object is a held-out combination by itself are left out, so that training on windows of training
    scenes keeps the promise of the splits.

    Raises:
        ValueError: If the window is larger than the grid.
    """
    if not 1 <= side <= grid:
        raise ValueError(f"a window of {side} does not fit into a grid of {grid}")
    boxes = [_box(item, grid) for item in scene.objects]
    found = []
    for number, item in enumerate(scene.objects):
        alone = replace(scene, task="colors", objects=(item,), relation=None)
        if is_unseen(alone):
            continue
        others = boxes[:number] + boxes[number + 1 :]
        x0, y0, x1, y1 = boxes[number]
        found += [
            ObjectWindow(alone, top, left, side)
            for top in _starts(y0, y1, grid, side)
            for left in _starts(x0, x1, grid, side)
            if not any(_touches(box, top, left, side) for box in others)
        ]
    return found


def _box(item: SceneObject, grid: int) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of an object's circle, in cells."""
    radius = item.diameter / 2
    return (
        (item.cx - radius) * grid,
        (item.cy - radius) * grid,
        (item.cx + radius) * grid,
        (item.cy + radius) * grid,
    )


def _starts(low: float, high: float, grid: int, side: int) -> range:
    return range(max(0, math.ceil(high - side)), min(grid - side, math.floor(low)) + 1)


def _touches(box: tuple[float, float, float, float], top: int, left: int, side: int) -> bool:
    x0, y0, x1, y1 = box
    return x1 > left and x0 < left + side and y1 > top and y0 < top + side
