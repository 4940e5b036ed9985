"""Connected components and simple morphology of small masks, in numpy.

Components are found from runs of equal labels: an image has a few hundred runs where it has 65,536 pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Component:
    """A connected patch of one label.

    Attributes:
        label: the label all its pixels have.
        area: number of pixels.
        top: first row.
        left: first column.
        mask: bool (h, w), the patch inside its bounding box.
    """

    label: int
    area: int
    top: int
    left: int
    mask: Mask


def connected_components(labels: NDArray[np.int8], *, min_area: int = 1) -> list[Component]:
    """Patches of equal, non-negative labels under 8-connectivity, largest first.

    Args:
        labels: int8 (H, W); negative values belong to no patch.
        min_area: smaller patches are left out.

    Returns:
        The components, by falling area and then by place.
    """
    runs = _runs(labels)
    parent = list(range(len(runs)))
    first_above, first_here, row = 0, 0, -1
    for i, (r, start, stop, label) in enumerate(runs):
        if r != row:
            first_above = first_here if r == row + 1 else i
            first_here, row = i, r
        for j in range(first_above, first_here):
            _, above_start, above_stop, above_label = runs[j]
            if above_start > stop:
                break
            if above_stop >= start and above_label == label:
                parent[_root(parent, i)] = _root(parent, j)
    groups: dict[int, list[tuple[int, int, int, int]]] = {}
    for i, run in enumerate(runs):
        groups.setdefault(_root(parent, i), []).append(run)
    found = [_component(group) for group in groups.values() if sum(g[2] - g[1] for g in group) >= min_area]
    return sorted(found, key=lambda c: (-c.area, c.top, c.left))


def _runs(labels: NDArray[np.int8]) -> list[tuple[int, int, int, int]]:
    """(row, start, stop, label) of every run of a non-negative label, in reading order."""
    height, width = labels.shape
    padded = np.full((height, width + 1), -1, np.int8)  # the extra column ends every run at its row's end
    padded[:, :width] = labels
    flat = padded.ravel()
    starts = np.flatnonzero(np.diff(flat, prepend=np.int8(-1)) != 0)
    stops = np.append(starts[1:], flat.size)
    values = flat[starts]
    keep = values >= 0
    starts, stops, values = starts[keep], stops[keep], values[keep]
    rows, columns = np.divmod(starts, width + 1)
    return list(zip(rows.tolist(), columns.tolist(), (columns + stops - starts).tolist(), values.tolist(), strict=True))


def _root(parent: list[int], i: int) -> int:
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = parent[i]
    return i


def _component(runs: list[tuple[int, int, int, int]]) -> Component:
    top, bottom = runs[0][0], max(r[0] for r in runs)
    left, right = min(r[1] for r in runs), max(r[2] for r in runs)
    mask = np.zeros((bottom - top + 1, right - left), np.bool_)
    for row, start, stop, _ in runs:
        mask[row - top, start - left : stop - left] = True
    return Component(runs[0][3], sum(r[2] - r[1] for r in runs), top, left, mask)


def fill_holes(mask: Mask) -> Mask:
    """The mask with every enclosed gap filled."""
    outside = np.pad(~mask, 1, constant_values=True)
    labels = np.where(outside, 0, -1).astype(np.int8)
    filled = np.pad(mask, 1)
    for gap in connected_components(labels):
        if gap.top > 0 and gap.left > 0:  # the outside is the only gap that reaches the padding
            height, width = gap.mask.shape
            filled[gap.top : gap.top + height, gap.left : gap.left + width] |= gap.mask
    return filled[1:-1, 1:-1]


def erode(mask: Mask, *, diagonal: bool) -> Mask:
    """Take away one layer of pixels; the frame counts as outside."""
    p = np.pad(mask, 1)
    out = p[1:-1, 1:-1] & p[:-2, 1:-1] & p[2:, 1:-1] & p[1:-1, :-2] & p[1:-1, 2:]
    if diagonal:
        out = out & p[:-2, :-2] & p[:-2, 2:] & p[2:, :-2] & p[2:, 2:]
    return out


def grow(seeds: NDArray[np.int8], mask: Mask) -> NDArray[np.int8]:
    """Spread labels (>= 0) over the connected mask, one layer at a time, until nothing changes."""
    labels = seeds
    while True:
        p = np.pad(labels, 1, constant_values=-1)
        spread = np.maximum.reduce([p[:-2, 1:-1], p[2:, 1:-1], p[1:-1, :-2], p[1:-1, 2:]])
        grown = np.where((labels < 0) & mask, spread, labels)
        if np.array_equal(grown, labels):
            return grown
        labels = grown
