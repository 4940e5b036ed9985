"""Scenes said with places: "red star <24> <h7>" names an object, its diameter and its square.

Diameters are percents of the side. Squares are named as on a chess board of 16 x 16, columns a to p from the left and
rows 1 to 16 from the top. A model that has learnt such prompts can be told where objects stand by text alone, so that
any text-to-image pipeline will do.
"""

from __future__ import annotations

import string
from collections.abc import Iterable
from typing import Final

from layton.scenes.world import Colour, Scene, Shape

GRID: Final = 16
DIAMETERS: Final = range(8, 41)
"""Diameters that have a token, in percent of the side."""
DIAMETER_TOKENS: Final = {f"<{percent}>": percent / 100 for percent in DIAMETERS}
SQUARE_TOKENS: Final = {
    f"<{string.ascii_lowercase[column]}{row + 1}>": ((column + 0.5) / GRID, (row + 0.5) / GRID)
    for row in range(GRID)
    for column in range(GRID)
}
"""Each square's middle (x, y), as fractions of the side."""


def placed_phrase(shape: Shape, colour: Colour, x: float, y: float, diameter: float) -> str:
    """One object: "red star <24> <h7>".

    Args:
        shape: what it is.
        colour: its colour.
        x: centre from the left edge, as a fraction of the side.
        y: centre from the top edge, likewise.
        diameter: of the circle around it, likewise; told as the nearest that has a token.

    Raises:
        ValueError: If the centre is not in the picture.
    """
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise ValueError(f"the centre of a placed object must be in [0, 1] x [0, 1], got ({x}, {y})")
    column, row = (min(int(place * GRID), GRID - 1) for place in (x, y))
    percent = min(max(round(100 * diameter), DIAMETERS[0]), DIAMETERS[-1])
    return f"{colour} {shape} <{percent}> <{string.ascii_lowercase[column]}{row + 1}>"


def placed_caption(scene: Scene) -> str:
    """All objects of a scene with their places: "red star <24> <h7>, blue ring <18> <c12>"."""
    return join_phrases(placed_phrase(o.shape, o.colour, o.cx, o.cy, o.diameter) for o in scene.objects)


def join_phrases(phrases: Iterable[str]) -> str:
    """Objects said one after the other."""
    return ", ".join(phrases)
