"""Draw a scene at any resolution: antialiased by signed-distance coverage, at sub-pixel places.

The whole background is one product of two thin matrices (gradients, stripes, checks and an interpolated noise
grid are all sums of few terms f(y) g(x)), and each object touches only the pixels of its own box.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from layton.scenes.sdf import Field, signed_distance
from layton.scenes.world import COLOURS, Background, Scene, Shape

MIN_SIZE: Final = 8
MAX_SIZE: Final = 4096


def render(scene: Scene, size: int) -> NDArray[np.uint8]:
    """Draw a scene.

    Args:
        scene: what to draw.
        size: side in pixels; 64 to 1024 is what the checker is measured for.

    Returns:
        uint8 (size, size, 3), sRGB in [0, 255].

    Raises:
        ValueError: if ``size`` is not in 8..4096.
    """
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise ValueError(f"size must be {MIN_SIZE} to {MAX_SIZE} pixels, got {size}")
    canvas = _background(scene.background, size)
    for item in scene.objects:
        radius = item.diameter / 2 * size
        cx, cy = item.cx * size, item.cy * size
        # One pixel more than the radius: coverage reaches half a pixel beyond the outline.
        x0, x1 = max(math.floor(cx - radius - 1), 0), min(math.ceil(cx + radius + 1), size)
        y0, y1 = max(math.floor(cy - radius - 1), 0), min(math.ceil(cy + radius + 1), size)
        if x0 >= x1 or y0 >= y1:
            continue
        alpha = coverage(item.shape, cx - x0, cy - y0, radius, item.rotation, y1 - y0, x1 - x0)[..., None]
        box = canvas[y0:y1, x0:x1]
        box += alpha * (np.asarray(COLOURS[item.colour], np.float32) - box)
    canvas += np.float32(0.5)  # rounding; every term is inside [0, 255] already
    return canvas.astype(np.uint8)


def coverage(shape: Shape, cx: float, cy: float, radius: float, rotation: float, height: int, width: int) -> Field:
    """How much of each pixel a shape covers.

    Args:
        shape: which of the eight.
        cx: centre in pixels, where the left edge of pixel 0 is 0 and its middle 0.5.
        cy: centre in pixels, downwards.
        radius: circumradius in pixels.
        rotation: degrees, counter-clockwise as seen.
        height: rows of the result.
        width: columns of the result.

    Returns:
        float32 (height, width) in [0, 1].
    """
    x = (np.arange(width, dtype=np.float32) + np.float32(0.5))[None, :]
    y = (np.arange(height, dtype=np.float32) + np.float32(0.5))[:, None]
    return coverage_at(shape, x, y, cx, cy, radius, rotation)


def coverage_at(
    shape: Shape, x: Field, y: Field, cx: float, cy: float, radius: float, rotation: float, *, edge: float = 1.0
) -> Field:
    """``coverage`` at chosen points, with an edge as soft as wanted.

    Args:
        shape: which of the eight.
        x: points in pixels, to the right, float32.
        y: points in pixels, downwards, broadcastable with ``x``.
        cx: centre in pixels.
        cy: centre in pixels.
        radius: circumradius in pixels.
        rotation: degrees, counter-clockwise as seen.
        edge: width in pixels over which coverage falls from 1 to 0; 1 is that of a pixel.

    Returns:
        float32 of the broadcast shape, in [0, 1].
    """
    angle = math.radians(rotation)
    cos, sin = np.float32(math.cos(angle) / radius), np.float32(math.sin(angle) / radius)
    u, v = x - np.float32(cx), np.float32(cy) - y
    distance = signed_distance(shape, u * cos + v * sin, v * cos - u * sin)
    distance *= np.float32(-radius / edge)
    distance += np.float32(0.5)
    np.maximum(distance, np.float32(0), out=distance)  # np.clip costs twice as much on small boxes
    return np.minimum(distance, np.float32(1), out=distance)


def _background(background: Background, size: int) -> Field:
    """float32 (size, size, 3) as a product of (size, r) and (r, size * 3) with r at most about 40."""
    place = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size)
    start = np.asarray(background.start, np.float32)
    rows, columns = _gradient_terms(background, place)
    step = np.asarray(background.end, np.float32) - start
    tint = [np.outer(c, step).ravel() for c in columns]
    for row, column in zip(*_texture_terms(background, place), strict=True):
        rows.append(row)
        tint.append(np.repeat(column, 3))
    rows.append(np.ones_like(place))
    tint.append(np.tile(start, size))
    product = np.stack(rows, axis=1).astype(np.float32) @ np.stack(tint).astype(np.float32)
    return product.reshape(size, size, 3)


def _gradient_terms(background: Background, place: Field) -> tuple[list[Field], list[Field]]:
    """Terms of a field in [0, 1]: along a direction, or the squared distance from a point on a circle."""
    one = np.ones_like(place)
    cos, sin = math.cos(math.radians(background.angle)), math.sin(math.radians(background.angle))
    if background.gradient == "linear":
        span = abs(cos) + abs(sin)
        return [one, (place - 0.5) * (sin / span) + 0.5], [(place - 0.5) * (cos / span), one]
    px, py = 0.5 + 0.35 * cos, 0.5 + 0.35 * sin
    reach = (0.5 + 0.35 * abs(cos)) ** 2 + (0.5 + 0.35 * abs(sin)) ** 2
    return [one, (place - py) ** 2 / reach], [(place - px) ** 2 / reach, one]


def _texture_terms(background: Background, place: Field) -> tuple[list[Field], list[Field]]:
    """Terms of a pattern in [-amplitude, amplitude], in grey levels."""
    if background.texture == "plain":
        return [], []
    rng = np.random.default_rng(background.seed)
    amplitude, turns = background.amplitude, 2 * math.pi * background.frequency
    if background.texture == "noise":
        return _noise_terms(rng, background.frequency, amplitude, place)
    phase_x, phase_y = rng.uniform(0, 2 * math.pi, 2)
    if background.texture == "checks":
        return [amplitude * np.sin(turns * place + phase_y)], [np.sin(turns * place + phase_x)]
    angle = math.radians(background.angle)
    ax, ay = turns * math.cos(angle) * place + phase_x, turns * math.sin(angle) * place
    return [amplitude * np.cos(ay), amplitude * np.sin(ay)], [np.sin(ax), np.cos(ax)]


def _noise_terms(
    rng: np.random.Generator, cells: int, amplitude: float, place: Field
) -> tuple[list[Field], list[Field]]:
    """A grid of (cells + 1)^2 random levels, interpolated linearly."""
    grid = rng.uniform(-amplitude, amplitude, (cells + 1, cells + 1)).astype(np.float32)
    knots = np.arange(cells + 1, dtype=np.float32)[:, None]
    hats = np.maximum(1 - np.abs(place[None, :] * np.float32(cells) - knots), 0)
    return list(hats), list(grid @ hats)
