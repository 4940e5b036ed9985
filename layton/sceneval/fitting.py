"""Fit a shape's coverage to a patch of an image: analysis by synthesis with the renderer's own outline.

Moments give a first guess for each shape, Gauss-Newton on (cx, cy, radius, rotation) refines the few best, and
the soft intersection over union says how well the shape explains the patch. Because a thin shape loses much overlap
by an error that a compact one hardly shows, scores are distances of outlines: (1 - IoU) x area / perimeter is how far
the outline is off on average.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from layton.scenes.render import coverage, coverage_at
from layton.scenes.world import SHAPES, Shape

Field = NDArray[np.float32]

_POINTS: Final = 36  # points per side that a patch is sampled at while fitting
_REFINED: Final = 3  # shapes that are refined after the first ranking
_STEPS: Final = 4
_EDGES: Final = (1.0, 2.0, 3.5, 5.0)  # how soft outlines may be, in pixels
_FIT_EDGE: Final = 2.5  # soft enough for derivatives, at any sharpness of the image
_TOLERANCE: Final = 0.04  # of the radius: how far an outline may be off on average
_TOLERANCE_PIXELS: Final = 0.35  # and beyond that, because small objects are blurred more
_SLACK: Final = 8.0  # degrees a shape may turn beyond what the renderer does


@dataclass(frozen=True, slots=True, eq=False)
class Patch:
    """What is to be explained.

    Attributes:
        alpha: float32 (h, w) in [0, 1], how much of each pixel belongs to the object.
        weight: float32 (h, w) in [0, 1], 0 where it cannot be known (hidden by another object).
    """

    alpha: Field
    weight: Field


@dataclass(frozen=True, slots=True)
class Pose:
    """A shape in its place, in pixels of the patch, with the quality of the fit.

    Attributes:
        shape: which of the eight.
        cx: centre, to the right.
        cy: centre, downwards.
        radius: circumradius.
        rotation: degrees, counter-clockwise.
        edge: softness of the outline in pixels.
        iou: soft intersection over union with the patch, in [0, 1].
    """

    shape: Shape
    cx: float
    cy: float
    radius: float
    rotation: float
    edge: float
    iou: float

    @property
    def score(self) -> float:
        """1 for a perfect outline, 0.5 for one that is off by as much as is tolerated, at least 0."""
        off = (1 - self.iou) * _geometry(self.shape).thickness * self.radius
        return max(0.0, 1 - 0.5 * off / (_TOLERANCE * self.radius + _TOLERANCE_PIXELS))

    def coverage(self, height: int, width: int) -> Field:
        """float32 (height, width): the share of each pixel it covers."""
        x, y = _axes(0, height, width, 1)
        return coverage_at(self.shape, x, y, self.cx, self.cy, self.radius, self.rotation, edge=self.edge)


@dataclass(frozen=True, slots=True)
class _Geometry:
    area: float  # in squared radii
    rise: float  # height of the centroid above the centre, in radii
    thickness: float  # area over perimeter, in radii


@cache
def _geometry(shape: Shape) -> _Geometry:
    size = 400
    field = coverage(shape, size / 2, size / 2, size / 2, 0.0, size, size).astype(np.float64)
    y = (size / 2 - np.arange(size) - 0.5) / (size / 2)
    area = float(field.sum()) / (size / 2) ** 2
    # The band of width h along the outline has area h x perimeter; the shape is drawn smaller so that it fits in.
    band, radius = 8.0, size / 2 - 8
    soft = coverage_at(shape, *_axes(0, size, size, 1), size / 2, size / 2, radius, 0.0, edge=band)
    perimeter = float(((soft > 0) & (soft < 1)).sum()) / band / radius
    return _Geometry(area, float((field.sum(1) * y).sum() / field.sum()), area / perimeter)


def best_fit(patch: Patch) -> Pose:
    """The shape and place that explain a patch best.

    Args:
        patch: some of its ``alpha * weight`` must be positive.

    Returns:
        The best pose of the best shape.
    """
    sample = _Sample.of(patch)
    mass = patch.alpha * patch.weight
    total = float(mass.sum())
    mx = float((mass.sum(0) * (np.arange(mass.shape[1]) + 0.5)).sum()) / total
    my = float((mass.sum(1) * (np.arange(mass.shape[0]) + 0.5)).sum()) / total
    guesses = sorted((_guess(sample, shape, mx, my, total) for shape in SHAPES), key=lambda p: -p.iou)
    refined = [_refine(sample, guess) for guess in guesses[:_REFINED]]
    refined.sort(key=lambda p: -p.iou)
    best = _final(patch, refined[0])
    runner_up = _final(patch, refined[1])
    return best if best.iou >= runner_up.iou else runner_up


@dataclass(frozen=True, slots=True, eq=False)
class _Sample:
    """A patch at a coarser grid of points, with their places in pixels."""

    alpha: Field
    weight: Field
    x: Field  # (1, w)
    y: Field  # (h, 1)

    @classmethod
    def of(cls, patch: Patch) -> _Sample:
        height, width = patch.alpha.shape
        stride = max(1, round(max(height, width) / _POINTS))
        x, y = _axes(stride // 2, height, width, stride)
        cut = (slice(stride // 2, None, stride), slice(stride // 2, None, stride))
        return cls(patch.alpha[cut], patch.weight[cut], x, y)

    def draw(self, shape: Shape, place: NDArray[np.float64], edge: float = _FIT_EDGE) -> Field:
        """Coverage for a place (cx, cy, radius, rotation x radius in radians)."""
        cx, cy, radius, arc = place.tolist()
        return coverage_at(shape, self.x, self.y, cx, cy, radius, math.degrees(arc / radius), edge=edge)


def _axes(first: int, height: int, width: int, stride: int) -> tuple[Field, Field]:
    x = np.arange(first, width, stride, dtype=np.float32) + np.float32(0.5)
    y = np.arange(first, height, stride, dtype=np.float32) + np.float32(0.5)
    return x[None, :], y[:, None]


def soft_iou(alpha: Field, drawn: Field, weight: Field) -> float:
    """Sum of minima over sum of maxima, both weighted."""
    union = float((np.maximum(alpha, drawn) * weight).sum())
    return float((np.minimum(alpha, drawn) * weight).sum()) / union if union > 0 else 0.0


def _guess(sample: _Sample, shape: Shape, mx: float, my: float, area: float) -> Pose:
    """Best of a few rotations, with centre and radius from the moments."""
    geometry, limit = _geometry(shape), SHAPES[shape].max_rotation
    radius = max(math.sqrt(area / geometry.area), 2.0)
    poses = []
    for rotation in np.linspace(-limit, limit, 5 if limit else 1).tolist():
        angle = math.radians(rotation)
        cx = mx + geometry.rise * radius * math.sin(angle)
        cy = my + geometry.rise * radius * math.cos(angle)
        drawn = coverage_at(shape, sample.x, sample.y, cx, cy, radius, rotation, edge=_FIT_EDGE)
        score = soft_iou(sample.alpha, drawn, sample.weight)
        poses.append(Pose(shape, cx, cy, radius, rotation, _FIT_EDGE, score))
    return max(poses, key=lambda p: p.iou)


def _refine(sample: _Sample, start: Pose) -> Pose:
    """Damped Gauss-Newton on the weighted squared difference of coverages."""
    place = np.array([start.cx, start.cy, start.radius, math.radians(start.rotation) * start.radius])
    limit = math.radians(SHAPES[start.shape].max_rotation + _SLACK)
    free = 4 if SHAPES[start.shape].max_rotation else 3  # discs and rings do not turn
    step = 0.35
    best, best_loss = place, math.inf
    for i in range(_STEPS + 1):
        drawn = sample.draw(start.shape, place)
        error = (sample.alpha - drawn) * sample.weight
        loss = float((error * error).sum())
        if loss < best_loss:
            best, best_loss = place, loss
        if i == _STEPS:
            break
        slopes = np.empty((free, error.size))
        for k in range(free):
            moved = place.copy()
            moved[k] += step
            slopes[k] = ((sample.draw(start.shape, moved) - drawn) * sample.weight).ravel() / step
        normal = slopes @ slopes.T
        normal[np.diag_indices(free)] += 1e-3 * np.trace(normal) / free + 1e-9
        change = np.clip(np.linalg.solve(normal, slopes @ error.ravel()), -3, 3)
        place = place.copy()
        place[:free] += change
        place[2] = max(place[2], 2.0)
        place[3] = np.clip(place[3], -limit * place[2], limit * place[2])
    cx, cy, radius, arc = best.tolist()
    score = soft_iou(sample.alpha, sample.draw(start.shape, best), sample.weight)
    return Pose(start.shape, cx, cy, radius, math.degrees(arc / radius), _FIT_EDGE, score)


def _final(patch: Patch, pose: Pose) -> Pose:
    """Score at full resolution with the edge that fits best."""
    height, width = patch.alpha.shape
    x, y = _axes(0, height, width, 1)
    scored = []
    for edge in _EDGES:
        drawn = coverage_at(pose.shape, x, y, pose.cx, pose.cy, pose.radius, pose.rotation, edge=edge)
        scored.append((soft_iou(patch.alpha, drawn, patch.weight), edge))
    score, edge = max(scored)
    return Pose(pose.shape, pose.cx, pose.cy, pose.radius, pose.rotation, edge, score)
