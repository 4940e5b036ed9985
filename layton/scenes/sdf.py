"""Signed distances of the eight shapes, for a circumscribed circle of radius one, y up.

Negative inside. Near straight edges and arcs the distance is exact, which is what antialiasing needs; at
corners it is that of the prolonged edges, which keeps tips sharp.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from layton.scenes.world import Shape

Field = NDArray[np.float32]

_SQUARE_HALF: Final = math.sqrt(0.5)
_STAR_INNER: Final = 0.45  # radius of the five inner corners
_CROSS_HALF: Final = 0.30  # half the width of an arm
_RING_MIDDLE: Final = 0.76
_RING_HALF: Final = 0.24
_DIAMOND_WIDTH: Final = 0.62  # half the short diagonal
# A heart is a square on its tip with half discs on both upper edges. With half diagonal 1 its smallest
# enclosing circle has centre (0, c) and radius 1 + c, where (1 + c - sqrt(1/2))^2 = 1/4 + (1/2 - c)^2.
_HEART_C: Final = (math.sqrt(2.0) - 1.0) / (3.0 - math.sqrt(2.0))
_HEART_HALF: Final = 1.0 / (1.0 + _HEART_C)


def _circle(x: Field, y: Field) -> Field:
    return np.sqrt(x * x + y * y) - np.float32(1)


def _square(x: Field, y: Field) -> Field:
    return np.maximum(np.abs(x), np.abs(y)) - np.float32(_SQUARE_HALF)


def _triangle(x: Field, y: Field) -> Field:
    sides = np.abs(x) * np.float32(math.sqrt(0.75)) + y * np.float32(0.5)
    return np.maximum(sides, -y) - np.float32(0.5)


def _star(x: Field, y: Field) -> Field:
    sector = 2 * math.pi / 5
    angle = np.arctan2(x, y)
    folded = np.abs(angle - np.float32(sector) * np.rint(angle / np.float32(sector)))
    radius = np.sqrt(x * x + y * y)
    # Edge from the tip (0, 1) to the inner corner at half a sector.
    ex, ey = _STAR_INNER * math.sin(sector / 2), _STAR_INNER * math.cos(sector / 2) - 1
    norm = math.hypot(ex, ey)
    nx, ny = -ey / norm, ex / norm
    across = np.float32(nx) * np.sin(folded) + np.float32(ny) * np.cos(folded)
    return np.subtract(radius * across, np.float32(ny), dtype=np.float32)


def _heart(x: Field, y: Field) -> Field:
    h = np.float32(_HEART_HALF)
    u, v = np.abs(x), y + np.float32(_HEART_C * _HEART_HALF)
    body = (u + np.abs(v) - h) * np.float32(_SQUARE_HALF)
    lobe = np.sqrt((u - h / 2) ** 2 + (v - h / 2) ** 2) - h * np.float32(_SQUARE_HALF)
    return np.minimum(body, lobe)


def _cross(x: Field, y: Field) -> Field:
    u, v = np.abs(x), np.abs(y)
    long, short = np.maximum(u, v), np.minimum(u, v)
    return np.maximum(long - np.float32(math.sqrt(1 - _CROSS_HALF**2)), short - np.float32(_CROSS_HALF))


def _ring(x: Field, y: Field) -> Field:
    return np.abs(np.sqrt(x * x + y * y) - np.float32(_RING_MIDDLE)) - np.float32(_RING_HALF)


def _diamond(x: Field, y: Field) -> Field:
    w = _DIAMOND_WIDTH
    norm = math.hypot(1.0, w)
    sides = np.abs(x) * np.float32(1 / norm) + np.abs(y) * np.float32(w / norm)
    return np.subtract(sides, np.float32(w / norm), dtype=np.float32)


_DISTANCES: Final[dict[Shape, Callable[[Field, Field], Field]]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "cross": _cross,
    "ring": _ring,
    "diamond": _diamond,
}


def signed_distance(shape: Shape, x: Field, y: Field) -> Field:
    """Distance to the outline of an upright shape of circumradius 1, negative inside.

    Args:
        shape: which of the eight.
        x: float32, any shape, to the right.
        y: float32, broadcastable with ``x``, up.

    Returns:
        float32 distances of the broadcast shape.
    """
    return _DISTANCES[shape](x, y)
