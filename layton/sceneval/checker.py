"""Does an image show what its prompt says? GenEval's rules (arXiv 2310.11513) on exactly found objects."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from layton.scenes.world import Relation
from layton.sceneval.detection import FoundObject, find_objects
from layton.sceneval.spec import PromptSpec, Requirement

_SLACK: Final = 0.1  # of both objects' extents is taken off the offset ...
_CLEAR: Final = 0.5  # ... which must then exceed this part of the distance between the centres


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The verdict on one image.

    Attributes:
        correct: whether everything asked for is there and nothing excluded is.
        reasons: what is wrong, one line each; empty if correct.
        found: all objects, best score first.
    """

    correct: bool
    reasons: tuple[str, ...]
    found: tuple[FoundObject, ...]


def check(image: NDArray[np.uint8] | Image.Image, spec: PromptSpec) -> CheckResult:
    """Find the objects of an image and compare them with a prompt's specification.

    Args:
        image: uint8 (H, W, 3) or a PIL image in RGB, sRGB.
        spec: what it must show.

    Returns:
        The verdict.

    Raises:
        ValueError: if the image is not uint8 (H, W, 3) with sides of at least 16.
    """
    return check_objects(find_objects(image), spec)


def check_objects(found: Sequence[FoundObject], spec: PromptSpec) -> CheckResult:
    """Compare objects with a specification, by GenEval's rules.

    For each include the ``count`` best-scored objects of its shape are taken; all must have the colour and stand in
    the relation to every object taken for the target. An exclude fails when ``count`` or more of its shape are there.

    Args:
        found: objects, best score first.
        spec: what must be shown.

    Returns:
        The verdict.
    """
    reasons: list[str] = []
    groups: list[list[FoundObject]] = []
    for item in spec.include:
        group = [f for f in found if f.shape == item.shape][: item.count]
        groups.append(group)
        if len(group) < item.count:
            reasons.append(f"expected {item.shape}>={item.count}, found {len(group)}")
        elif item.colour is not None and any(f.colour != item.colour for f in group):
            colours = ", ".join(f.colour for f in group)
            reasons.append(f"expected {item.colour} {item.shape}>={item.count}, found {colours}")
    if not reasons:
        reasons = [line for i, item in enumerate(spec.include) for line in _misplaced(item, groups, i)]
    for exclusion in spec.exclude:
        count = sum(f.shape == exclusion.shape for f in found)
        if count >= exclusion.count:
            reasons.append(f"expected {exclusion.shape}<{exclusion.count}, found {count}")
    return CheckResult(not reasons, tuple(reasons), tuple(found))


def relations_between(first: FoundObject, second: FoundObject) -> frozenset[Relation]:
    """Where ``first`` stands as seen from ``second``: none, one or two of GenEval's four relations."""
    dx, dy = first.cx - second.cx, first.cy - second.cy
    distance = math.hypot(dx, dy)
    if distance == 0:
        return frozenset()
    slack = _SLACK * (first.diameter + second.diameter)
    across, down = (math.copysign(max(abs(d) - slack, 0.0), d) / distance for d in (dx, dy))
    verdicts: tuple[tuple[Relation, bool], ...] = (
        ("left of", across < -_CLEAR),
        ("right of", across > _CLEAR),
        ("above", down < -_CLEAR),
        ("below", down > _CLEAR),
    )
    return frozenset(name for name, holds in verdicts if holds)


def _misplaced(item: Requirement, groups: list[list[FoundObject]], index: int) -> list[str]:
    """One line for each pair of objects that is not in the relation asked for."""
    if item.relation is None or item.target is None:
        return []
    lines = []
    for first in groups[index]:
        for second in groups[item.target]:
            seen = relations_between(first, second)
            if item.relation not in seen:
                words = " and ".join(sorted(seen)) or "in no clear relation to"
                lines.append(f"expected {item.shape} {item.relation} {second.shape}, found it {words}")
    return lines
