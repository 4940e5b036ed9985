"""Cells of a grid laid over a scene, and which of them a raster scan can know to be next to an object."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from layton.scenes.render import coverage
from layton.scenes.world import Scene

_POINTS = 8  # a cell is looked at with so many points a side


def object_cells(scene: Scene, grid: int) -> NDArray[np.bool_]:
    """(grid, grid): whether an object touches the cell."""
    side = grid * _POINTS
    touched = np.zeros((side, side), dtype=bool)
    for item in scene.objects:
        touched |= (
            coverage(item.shape, item.cx * side, item.cy * side, item.diameter * side / 2, item.rotation, side, side)
            > 0
        )
    cells: NDArray[np.bool_] = np.any(touched.reshape(grid, _POINTS, grid, _POINTS), axis=(1, 3))
    return cells


def begun_cells(scene: Scene, grid: int) -> NDArray[np.bool_]:
    """(grid, grid): whether an object touches the cell on the left or one of the three above.

    It says nothing of the cell itself: whoever reads row by row knows it before the cell comes.
    """
    touched = np.pad(object_cells(scene, grid), ((1, 0), (1, 1)))
    above, row = touched[:-1], touched[1:]
    return above[:, :-2] | above[:, 1:-1] | above[:, 2:] | row[:, :-2]
