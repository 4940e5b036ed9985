"""Cells of a grid laid over a scene, and what a raster scan can know at each of them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from layton.scenes.render import coverage
from layton.scenes.world import COLOURS, MAX_OBJECTS, SHAPES, Scene, SceneObject

_POINTS = 8  # a cell is looked at with so many points a side
SHOWN_SIZES = (len(SHAPES) + 1, len(COLOURS) + 1, MAX_OBJECTS + 1)  # numbers of values of `objects_shown`
AHEAD_SIZES = (MAX_OBJECTS + 1, len(SHAPES) + 1, len(COLOURS) + 1)  # numbers of values of `objects_ahead`


def object_cells(scene: Scene, grid: int) -> NDArray[np.bool_]:
    """(grid, grid): whether an object touches the cell."""
    cells = np.zeros((grid, grid), dtype=bool)
    for item in scene.objects:
        cells |= _cells_of(item, grid)
    return cells


def begun_cells(scene: Scene, grid: int) -> NDArray[np.bool_]:
    """(grid, grid): whether an object touches the cell on the left or one of the three above.

    It says nothing of the cell itself: whoever reads row by row knows it before the cell comes.
    """
    touched = np.pad(object_cells(scene, grid), ((1, 0), (1, 1)))
    above, row = touched[:-1], touched[1:]
    return above[:, :-2] | above[:, 1:-1] | above[:, 2:] | row[:, :-2]


def objects_ahead(scene: Scene, grid: int) -> NDArray[np.int64]:
    """What is still to be drawn when a raster scan comes to each cell, that cell included.

    Returns:
        (grid * grid, 3): how many objects begin here or later; of the first of these its shape and its colour, as
        places in `SHAPES` and `COLOURS` counted from 1, and 0 where no object is left. `AHEAD_SIZES` says how many
        values each has.
    """
    first = [int(np.flatnonzero(_cells_of(item, grid)).min()) for item in scene.objects]
    begins = sorted(zip(first, scene.objects, strict=True), key=lambda each: each[0])
    ahead = np.zeros((grid * grid, len(AHEAD_SIZES)), dtype=np.int64)
    shapes, colours = list(SHAPES), list(COLOURS)
    start = 0
    for number, (cell, item) in enumerate(begins):
        left = len(begins) - number
        ahead[start : cell + 1] = left, shapes.index(item.shape) + 1, colours.index(item.colour) + 1
        start = max(start, cell + 1)
    return ahead


def objects_shown(scene: Scene, grid: int) -> NDArray[np.int64]:
    """What is seen in each cell.

    Returns:
        (grid * grid, 3): shape and colour of an object that touches the cell, as places in `SHAPES` and `COLOURS`
        counted from 1, and 0 where there is none; how many objects' centres lie there. `SHOWN_SIZES` says how many
        values each has. Of two objects the one whose centre is nearer is seen.
    """
    shapes, colours = list(SHAPES), list(COLOURS)
    shown = np.zeros((grid, grid, len(SHOWN_SIZES)), dtype=np.int64)
    nearest = np.full((grid, grid), np.inf)
    middle = (np.arange(grid) + 0.5) / grid
    for item in scene.objects:
        distance = np.hypot(middle[:, None] - item.cy, middle[None] - item.cx)
        seen = _cells_of(item, grid) & (distance < nearest)
        shown[seen, :2] = shapes.index(item.shape) + 1, colours.index(item.colour) + 1
        nearest[seen] = distance[seen]
        row, column = (min(int(place * grid), grid - 1) for place in (item.cy, item.cx))
        shown[row, column, 2] += 1
    return shown.reshape(grid * grid, -1)


def objects_placed(scene: Scene, steps: int) -> NDArray[np.int64]:
    """Where objects stand, in the scene's own order.

    Returns:
        (MAX_OBJECTS, 5): shape and colour as places in `SHAPES` and `COLOURS` counted from 1, and centre (x, y) and
        diameter in steps of which the side has ``steps``; zeros behind the last object.
    """
    shapes, colours = list(SHAPES), list(COLOURS)
    placed = np.zeros((MAX_OBJECTS, 5), dtype=np.int64)
    for row, item in enumerate(scene.objects):
        places = (min(int(place * steps), steps - 1) for place in (item.cx, item.cy, item.diameter))
        placed[row] = (shapes.index(item.shape) + 1, colours.index(item.colour) + 1, *places)
    return placed


def _cells_of(item: SceneObject, grid: int) -> NDArray[np.bool_]:
    """(grid, grid): whether the object touches the cell."""
    side = grid * _POINTS
    drawn = coverage(item.shape, item.cx * side, item.cy * side, item.diameter * side / 2, item.rotation, side, side)
    cells: NDArray[np.bool_] = np.any((drawn > 0).reshape(grid, _POINTS, grid, _POINTS), axis=(1, 3))
    return cells
