"""Which tensor of a file becomes which tensor of a part, and whether a file has exactly those.

A layout is made from parts built on the meta device, so that every name and shape of a file is checked before memory
is taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from layton.convert.checkpoint import ConvertError


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one tensor of the file goes.

    Attributes:
        part: Name of the part, such as "encoder".
        key: Its name in the part's state dict.
        shape: Its shape there.
        file_shape: Its shape in the file; has as many elements.
    """

    part: str
    key: str
    shape: tuple[int, ...]
    file_shape: tuple[int, ...]


Layout = dict[str, Slot]
"""From names in the file."""


def slot(part: str, key: str, template: Tensor, *, file_shape: tuple[int, ...] | None = None) -> Slot:
    """A slot for a tensor like ``template``, which has the same shape in the file unless another is given."""
    shape = tuple(template.shape)
    return Slot(part, key, shape, shape if file_shape is None else file_shape)


def check(layout: Layout, state: Mapping[str, Tensor], *, ignored: Iterable[str] = ()) -> list[str]:
    """Every missing, unknown, mis-shaped and non-finite tensor of ``state``, one line each, sorted by kind and name.

    Args:
        layout: What the file should hold.
        state: What it holds.
        ignored: Names, or prefixes that end in a dot, that are left out of the check.
    """
    exact = set(ignored)
    prefixes = tuple(name for name in exact if name.endswith("."))
    extra = [
        key for key in state.keys() - layout.keys() if key not in exact and not key.startswith(prefixes or ("\0",))
    ]
    problems = [f"missing {key} {layout[key].file_shape}" for key in sorted(layout.keys() - state.keys())]
    problems += [f"unknown {key} {tuple(state[key].shape)}" for key in sorted(extra)]
    for key in sorted(layout.keys() & state.keys()):
        found, wanted = tuple(state[key].shape), layout[key].file_shape
        if found != wanted:
            problems.append(f"mis-shaped {key}: {found} in the file, {wanted} expected")
        elif not bool(torch.isfinite(state[key]).all()):
            problems.append(f"not finite {key}")
    return problems


def require(layout: Layout, state: Mapping[str, Tensor], *, source: Path | str, ignored: Iterable[str] = ()) -> None:
    """Stop unless ``state`` fits ``layout`` exactly.

    Raises:
        ConvertError: It does not; all reasons are listed.
    """
    problems = check(layout, state, ignored=ignored)
    if problems:
        raise ConvertError(source, problems)


def take(layout: Layout, state: Mapping[str, Tensor], part: str, *, dtype: torch.dtype) -> dict[str, Tensor]:
    """The state dict of one part, under this library's names and shapes.

    The tensors are copies: those of a memory-mapped file would change, or crash the process, with the file.
    """
    return {
        place.key: state[name].reshape(place.shape).to(dtype, copy=True)
        for name, place in layout.items()
        if place.part == part
    }
