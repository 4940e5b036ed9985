"""Where objects are to stand: what a generator may be told beside the caption, and how it hears it.

A layout is a short list of objects, each with labels (of Scenes: shape and colour) and a circle. At the place of each
code the transformer is told which object lies there, if any, and where in it the place is: control added at the code
that is predicted next, as in ControlAR (arXiv 2410.02705, "conditional decoding"), not a longer prefix.

Legend: B images, M objects at most, F = K + 3 numbers of an object (K labels, x, y, diameter), N codes, D width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layton.scenes import COLOURS, SHAPES
from layton.scenes.world import MAX_OBJECTS

UNTOLD: Final = -1
"""Every number of a layout that is not given; a given one without objects is all zeros."""
_WAVES: Final = (0.125, 0.25, 0.5)  # periods in a cell: places within an object are told to a fraction of one
_NUMBERS: Final = 6 + 4 * len(_WAVES)


@dataclass(frozen=True, slots=True)
class PlacedObject:
    """An object of a layout.

    Attributes:
        labels: What it is, such as ``("star", "red")``.
        x: Centre from the left edge, as a fraction of the side.
        y: Centre from the top edge, as a fraction of the side.
        diameter: Of the circle around it, as a fraction of the side.
    """

    labels: tuple[str, ...]
    x: float
    y: float
    diameter: float


@dataclass(frozen=True, slots=True)
class LayoutShape:
    """What layouts of a model look like.

    Attributes:
        labels: The names that each label may have, K tuples.
        objects: M.
        steps: Places and diameters are told in so many steps of the side.

    Raises:
        ValueError: If there is nothing to tell.
    """

    labels: tuple[tuple[str, ...], ...]
    objects: int = 5
    steps: int = 64

    def __post_init__(self) -> None:
        """Check ranges; lists, as JSON has them, become tuples."""
        if any(isinstance(names, str) for names in self.labels):
            raise ValueError(f"each label has a list of names, got {self.labels!r}")
        object.__setattr__(self, "labels", tuple(tuple(names) for names in self.labels))
        if any(len(set(names)) < len(names) for names in self.labels):
            raise ValueError(f"the names of a label differ from each other, got {self.labels}")
        if not self.labels or not all(self.labels) or self.objects < 1 or self.steps < 2:
            raise ValueError(f"a layout needs labels with names, objects >= 1 and steps >= 2, got {self}")

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many values each of the F numbers has; value 0 of a label stands for no object."""
        return (*(len(names) + 1 for names in self.labels), self.steps, self.steps, self.steps)

    def tensor(self, objects: Sequence[PlacedObject]) -> Tensor:
        """A layout (M, F) int64.

        Raises:
            ValueError: If there are too many objects, a label is unknown, or a place is outside [0, 1].
        """
        if len(objects) > self.objects:
            raise ValueError(f"a layout has at most {self.objects} objects, got {len(objects)}")
        rows = [self._row(item) for item in objects]
        return torch.tensor(rows + [[0] * len(self.sizes)] * (self.objects - len(rows)), dtype=torch.int64)

    def objects_of(self, layout: Tensor) -> list[PlacedObject] | None:
        """What a layout (M, F) says, in its order; None if it is not given. Places are middles of steps."""
        if bool((layout == UNTOLD).all()):
            return None
        count = len(self.labels)
        return [
            PlacedObject(
                tuple(names[max(value, 1) - 1] for names, value in zip(self.labels, row[:count], strict=True)),
                *((value + 0.5) / self.steps for value in row[count:]),
            )
            for row in layout.tolist()
            if row[0] > 0
        ]

    def alike(self, layouts: Tensor) -> Tensor:
        """Whether layouts (T, B, M, F) have the labels of the first of each image, in any order, (T, B)."""
        labels = layouts[..., : len(self.labels)]
        bases = torch.tensor([math.prod(self.sizes[:n]) for n in range(len(self.labels))], device=layouts.device)
        named = (labels * bases).sum(-1).sort(-1).values
        return (named == named[:1]).all(-1)

    def untold(self, rows: int) -> Tensor:
        """``rows`` layouts that are not given."""
        return torch.full((rows, self.objects, len(self.sizes)), UNTOLD)

    def overlap(self, layout: Tensor) -> Tensor:
        """How far the circles of each layout (B, M, F) reach into each other, as shares of their radii, (B,)."""
        centre, diameter = ((layout[..., len(self.labels) :] + 0.5) / self.steps).split([2, 1], dim=-1)
        apart = torch.cdist(centre, centre)
        touching = (diameter + diameter.mT) / 2
        there = layout[..., 0] > 0
        pairs = (there[:, :, None] & there[:, None]).triu(1)
        return (1 - apart / touching).clamp_min(0).masked_fill(~pairs, 0.0).sum((1, 2))

    def check(self, layout: Tensor, rows: int) -> None:
        """Refuse what is no layout of this shape.

        Raises:
            ValueError: If shape, type or range is another.
        """
        wanted = (rows, self.objects, len(self.sizes))
        if layout.shape != wanted or layout.dtype != torch.int64:
            raise ValueError(f"layouts must be int64 {wanted}, got {layout.dtype} {tuple(layout.shape)}")
        if rows and bool((layout < UNTOLD).any() | (layout >= torch.tensor(self.sizes, device=layout.device)).any()):
            raise ValueError(
                f"numbers of a layout must be in [{UNTOLD}, {self.sizes}), got {layout.amin()}..{layout.amax()}"
            )

    def _row(self, item: PlacedObject) -> list[int]:
        if not isinstance(item, PlacedObject):
            raise ValueError(f"a layout is a list of PlacedObject, got {str(item)[:80]}")
        if len(item.labels) != len(self.labels):
            raise ValueError(f"an object has {len(self.labels)} labels, got {item.labels}")
        for names, label in zip(self.labels, item.labels, strict=True):
            if label not in names:
                raise ValueError(f"a label must be one of {', '.join(names)}, got {label!r}")
        places = (item.x, item.y, item.diameter)
        if not all(0.0 <= place <= 1.0 for place in places):
            raise ValueError(f"places and diameters are fractions of the side, in [0, 1], got {places}")
        found = [names.index(label) + 1 for names, label in zip(self.labels, item.labels, strict=True)]
        return found + [min(int(place * self.steps), self.steps - 1) for place in places]


def scenes_layout(*, steps: int = 64) -> LayoutShape:
    """The shape of layouts of Scenes: shape and colour of up to five objects."""
    return LayoutShape((tuple(SHAPES), tuple(COLOURS)), MAX_OBJECTS, steps)


def read_layout(path: Path) -> list[PlacedObject]:
    """A JSON file of a list of objects, ``{"labels": ["star", "red"], "x": 0.3, "y": 0.5, "diameter": 0.25}`` each.

    What ``layton generate --json`` wrote of one image is read as well.

    Raises:
        ValueError: If it cannot be read, or is something else.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no layout can be read ({error})") from error
    if isinstance(rows, dict) and isinstance(rows.get("layouts"), list):
        if len(rows["layouts"]) != 1:
            raise ValueError(f"{path} tells of {len(rows['layouts'])} images: keep the layout of the one that is meant")
        (rows,) = rows["layouts"]
    if not isinstance(rows, list):
        raise ValueError(f"{path}: a layout is a list of objects, got {type(rows).__name__}")
    return [_placed(row, f"{path}: object {number}") for number, row in enumerate(rows)]


def _placed(row: object, where: str) -> PlacedObject:
    if not isinstance(row, dict) or set(row) != {"labels", "x", "y", "diameter"}:
        raise ValueError(f"{where} needs labels, x, y and diameter, and nothing else, got {str(row)[:80]}")
    labels, places = row["labels"], [row["x"], row["y"], row["diameter"]]
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"{where}: labels are a list of words, got {str(labels)[:80]}")
    if not all(isinstance(place, int | float) and not isinstance(place, bool) and 0 <= place <= 1 for place in places):
        raise ValueError(f"{where}: x, y and diameter are numbers in [0, 1], got {str(places)[:80]}")
    return PlacedObject(tuple(labels), *(float(place) for place in places))


class LayoutControl(nn.Module):
    """Tells each place which object lies there: of those whose circle touches the cell, the nearest for its size.

    Args:
        shape: Of the layouts.
        num_tokens: N, a square number.
        width: D.
    """

    def __init__(self, shape: LayoutShape, num_tokens: int, width: int) -> None:
        super().__init__()
        self.shape, self.grid = shape, math.isqrt(num_tokens)
        self.labels = nn.ModuleList(nn.Embedding(len(names) + 1, 2 * width) for names in shape.labels)
        self.place = nn.Linear(_NUMBERS, 2 * width)
        self.out = nn.Linear(2 * width, width, bias=False)

    def start_silent(self) -> None:
        """Tell nothing at first: a model that learnt without layouts goes on as it was."""
        nn.init.zeros_(self.out.weight)

    def forward(self, layout: Tensor) -> Tensor:
        """Layouts (B, M, F) -> (B, N, D); all zeros for those that are not given."""
        kind = next(self.labels.parameters()).dtype
        told = (layout[:, 0, 0] != UNTOLD).to(kind)
        names, numbers = self.seen(layout.clamp_min(0))
        hidden = self.place(numbers.to(kind))
        for number, embedding in enumerate(self.labels):
            hidden = hidden + embedding(names[..., number])
        control: Tensor = self.out(F.gelu(hidden, approximate="tanh"))
        return control * told[:, None, None]

    def seen(self, layout: Tensor) -> tuple[Tensor, Tensor]:
        """What lies at each place: labels (B, N, K) int64, 0 for nothing, and where in it the place is (B, N, _)."""
        count = len(self.shape.labels)
        centre, diameter = ((layout[..., count:] + 0.5) / self.shape.steps).split([2, 1], dim=-1)
        middle = (torch.arange(self.grid, device=layout.device) + 0.5) / self.grid
        cells = torch.stack([middle.repeat(self.grid), middle.repeat_interleave(self.grid)], dim=1)
        offset = cells - centre[:, :, None]  # (B, M, N, 2)
        reach = diameter / 2 + math.sqrt(0.5) / self.grid  # to the far corner of a cell
        near = offset.norm(dim=-1) / reach
        near = near.masked_fill(layout[..., :1] == 0, math.inf)
        least, chosen = near.min(dim=1)  # (B, N)
        there = (least <= 1)[..., None]
        rows = torch.arange(len(layout), device=layout.device)[:, None]
        own = offset[rows, chosen, torch.arange(self.grid**2, device=layout.device)]
        size = diameter[rows, chosen]
        waves = [turn(2 * math.pi * wave * self.grid * own) for wave in _WAVES for turn in (torch.sin, torch.cos)]
        numbers = torch.cat([own / size, own * self.grid / 4, size, own.norm(dim=-1, keepdim=True) / size, *waves], -1)
        return torch.where(there, layout[rows, chosen, :count], 0), torch.where(there, numbers, 0.0)
