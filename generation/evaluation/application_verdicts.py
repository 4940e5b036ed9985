"""Verdicts on HiPA's applications on scenes: whether what was asked for is what the checker finds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from layton.scenes import Scene, SceneObject
from layton.scenes.cases import HOLE_MARGIN, Hole
from layton.sceneval import FoundObject

PLACE_TOLERANCE = 0.06  # of the side: how far a centre may be found from where the object is


def shows(scene: Scene, found: Sequence[FoundObject]) -> bool:
    """Whether exactly the objects of a scene were found, each by shape, colour and place."""
    return len(found) == len(scene.objects) and all(is_found(item, found) for item in scene.objects)


def fills(hole: Hole, found: Sequence[FoundObject], size: int) -> bool:
    """Whether the missing object, and no other one, was found with its centre in the hole."""
    rows, columns = hole.box(size)
    inside = [
        (f.shape, f.colour)
        for f in found
        if rows.start <= f.cy * size < rows.stop and columns.start <= f.cx * size < columns.stop
    ]
    return inside == [(hole.item.shape, hole.item.colour)]


def is_found(item: SceneObject, found: Sequence[FoundObject]) -> bool:
    """Whether an object was found, by shape, colour and place."""
    return any(
        (f.shape, f.colour) == (item.shape, item.colour)
        and math.hypot(f.cx - item.cx, f.cy - item.cy) <= PLACE_TOLERANCE
        for f in found
    )


def circles(items: Sequence[SceneObject], size: int) -> Tensor:
    """Mask (S, S) of the objects' circles, with a margin."""
    places = (torch.arange(size) + 0.5) / size
    y, x = torch.meshgrid(places, places, indexing="ij")
    inside = [torch.hypot(x - item.cx, y - item.cy) <= item.diameter / 2 + HOLE_MARGIN for item in items]
    return torch.stack(inside).any(dim=0)
