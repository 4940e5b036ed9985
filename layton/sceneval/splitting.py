"""Take apart objects of one colour that touch.

Eroding a patch cuts it at its narrow neck before the objects themselves vanish. What is left seeds the parts;
each part is then fitted with the others' pixels taken away.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from layton.scenes.world import MAX_OBJECTS
from layton.sceneval.components import Mask, connected_components, erode, fill_holes, grow
from layton.sceneval.fitting import Field, Patch, Pose, best_fit, soft_iou

_ROUNDS: Final = 2
_MARGIN: Final = 3  # pixels around a part that belong to its fit
_MIN_SEED: Final = 3  # pixels
_MIN_SHARE: Final = 0.06  # of the patch: five objects of 12 and 26 % of the side differ in area by 4.7


def split_fit(patch: Patch, mask: Mask, *, min_area: int) -> tuple[list[Pose], float]:
    """Explain a patch by several shapes.

    Args:
        patch: the patch.
        mask: bool (h, w), its pixels.
        min_area: parts with fewer pixels are no objects.

    Returns:
        The poses and the soft intersection over union of their union with the patch; no poses and 0 if the
        patch has no neck to cut.
    """
    best: list[Pose] = []
    best_score = 0.0
    tried: list[NDArray[np.int8]] = []
    for solid in (fill_holes(mask), mask):
        for parts in _cuts(solid, mask, min_area):
            if any(np.array_equal(parts, other) for other in tried):
                continue
            tried.append(parts)
            poses, score = _fit_parts(patch, parts)
            if score > best_score:
                best, best_score = poses, score
    return best, best_score


def _cuts(solid: Mask, mask: Mask, min_area: int) -> list[NDArray[np.int8]]:
    """Label maps of the patch, one for each number of parts that eroding it shows, the first of each kind."""
    cuts: dict[int, NDArray[np.int8]] = {}
    core, level = solid, 0
    while core.any():
        core, level = erode(core, diagonal=level % 2 == 1), level + 1
        labels = np.where(core, 0, -1).astype(np.int8)
        seeds = [c for c in connected_components(labels) if c.area >= _MIN_SEED]
        if not 2 <= len(seeds) <= MAX_OBJECTS + 3 or len(seeds) in cuts:
            continue
        marked = np.full(solid.shape, -1, np.int8)
        for k, seed in enumerate(seeds):
            height, width = seed.mask.shape
            marked[seed.top : seed.top + height, seed.left : seed.left + width][seed.mask] = k
        parts = np.where(mask, grow(marked, solid), np.int8(-1))
        areas = [int((parts == k).sum()) for k in range(len(seeds))]
        if min(areas) >= max(min_area, _MIN_SHARE * mask.sum()):
            cuts[len(seeds)] = parts
    return list(cuts.values())


def _fit_parts(patch: Patch, parts: NDArray[np.int8]) -> tuple[list[Pose], float]:
    count = int(parts.max()) + 1
    height, width = parts.shape
    poses: list[Pose] = []
    owned = [parts == k for k in range(count)]
    for turn in range(_ROUNDS):
        drawn = [pose.coverage(height, width) for pose in poses]
        poses = []
        for k in range(count):
            others = np.zeros(parts.shape, np.bool_)
            for j in range(count):
                if j != k:
                    others |= owned[j] if turn == 0 else drawn[j] > 0.5
            # What the others own says nothing about this one.
            weight = np.where(others, np.float32(0), patch.weight)
            pose = _fit_window(patch.alpha, weight, owned[k])
            if pose is None:  # the others explain all of this part, so it is none
                return [], 0.0
            poses.append(pose)
    union = np.zeros(parts.shape, np.float32)
    for pose in poses:
        union = np.maximum(union, pose.coverage(height, width))
    return poses, soft_iou(patch.alpha, union, patch.weight)


def _fit_window(alpha: Field, weight: Field, owned: Mask) -> Pose | None:
    """Fit one part inside its own box, and give the pose in the patch's pixels; None if nothing is left to explain."""
    rows, columns = np.flatnonzero(owned.any(1)), np.flatnonzero(owned.any(0))
    top, left = max(int(rows[0]) - _MARGIN, 0), max(int(columns[0]) - _MARGIN, 0)
    window = (slice(top, int(rows[-1]) + 1 + _MARGIN), slice(left, int(columns[-1]) + 1 + _MARGIN))
    if not (alpha[window] * weight[window]).any():
        return None
    pose = best_fit(Patch(alpha[window], weight[window]))
    return replace(pose, cx=pose.cx + left, cy=pose.cy + top)
