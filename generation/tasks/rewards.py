"""Rewards of generated images, for `generation.tasks.reward`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layton.scenes import sample_scene, seed_of_key
from layton.sceneval.checker import check_objects, relations_between
from layton.sceneval.detection import MIN_SCORE, FoundObject, find_objects
from layton.sceneval.prompts import spec_of_caption
from layton.sceneval.spec import PromptSpec

_Side = tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """What a reward says of B images.

    Attributes:
        total: (B,) of the whole images, larger is better.
        credit: (B, h, w) of the places of the token grid: above 0 where something stands as it should, below 0 where
            it should not, 0 where nothing does; None of a reward that cannot tell places apart.
    """

    total: Tensor
    credit: Tensor | None = None

    def checked(self, count: int, grid: _Side) -> Scores:
        """The same in float32 on the CPU.

        Raises:
            ValueError: If they are not finite numbers for ``count`` images and their places.
        """
        kinds = {"total": (self.total, (count,)), "credit": (self.credit, (count, *grid))}
        for name, (value, shape) in kinds.items():
            if value is not None and (value.shape != shape or not bool(value.isfinite().all())):
                raise ValueError(f"a reward's {name} must be finite numbers {shape}, got {tuple(value.shape)}: {value}")
        return Scores(self.total.float().cpu(), None if self.credit is None else self.credit.float().cpu())


class Reward(ABC):
    """How well images show what their captions ask for; needs no gradient."""

    @abstractmethod
    def score(self, images: Tensor, captions: Sequence[str], keys: Sequence[str], *, grid: _Side) -> Scores:
        """Scores of images (B, 3, S, S) in [-1, 1]; keys are the prompts' names, ``grid`` that of the tokens.

        Images are on the task's device; what else is needed, a reward brings there itself.
        """


class SceneReward(Reward):
    """SceneEval's verdict on images whose prompts are captions of Scenes: keys are ``scenes/<seed>``.

    Args:
        partial: Weight, in [0, 1), of the share of things that are right; the rest is for images in which all is.
            With it groups of failures still differ: three stars of four are better than an empty picture.

    Raises:
        ValueError: If ``partial`` is out of range.
    """

    def __init__(self, partial: float = 0.3) -> None:
        if not 0.0 <= partial < 1.0:
            raise ValueError(f"partial must be in [0, 1), got {partial}")
        self.partial = partial

    def score(self, images: Tensor, captions: Sequence[str], keys: Sequence[str], *, grid: _Side) -> Scores:
        """Totals in [0, 1]; credit 1 of objects that are asked for, -1 of all others and of those out of place.

        Raises:
            ValueError: If a key names no scene, or a caption does not hold for its scene.
        """
        pixels = images.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        rows = zip(pixels, captions, keys, strict=True)
        found = [self._score(np.ascontiguousarray(image), _spec(text, key), grid) for image, text, key in rows]
        return Scores(torch.tensor([total for total, _ in found]), torch.stack([credit for _, credit in found]))

    def _score(self, image: NDArray[np.uint8], spec: PromptSpec, grid: _Side) -> tuple[float, Tensor]:
        patches = find_objects(image, min_score=0.0)
        found = [patch for patch in patches if patch.score >= MIN_SCORE]
        total = (1 - self.partial) * check_objects(found, spec).correct + self.partial * overlap(found, spec)
        return total, credit_map(patches, spec, grid)


def overlap(found: Sequence[FoundObject], spec: PromptSpec) -> float:
    """Objects that are asked for and there, by shape and colour, over the larger of both numbers; in [0, 1]."""
    right = sum(min(item.count, sum(_is(f, item.shape, item.colour) for f in found)) for item in spec.include)
    return right / max(len(found), sum(item.count for item in spec.include))


def credit_map(patches: Sequence[FoundObject], spec: PromptSpec, grid: _Side) -> Tensor:
    """1 where an object stands that is asked for, -1 where another patch does, on a grid (h, w).

    Objects are taken from the top, as they are drawn: the first that fits is the one that was asked for, a second is
    one too many. Of two that do not stand as they should, the later one is wrong. Where patches overlap, one that is
    right wins.
    """
    left = [item.count for item in spec.include]
    taken: dict[int, FoundObject] = {}
    credit = torch.zeros(grid)
    for patch in sorted(patches, key=lambda each: each.cy - each.diameter / 2):
        fits = [
            index
            for index, item in enumerate(spec.include)
            if left[index] and patch.score >= MIN_SCORE and _is(patch, item.shape, item.colour)
        ]
        right = bool(fits) and _stands_right(patch, fits[0], taken, spec)
        if fits:
            left[fits[0]] -= 1
            taken[fits[0]] = patch
        cells = _cells(patch, grid)
        credit[cells] = 1.0 if right else torch.where(credit[cells] > 0, 1.0, -1.0)
    return credit


def _is(patch: FoundObject, shape: str, colour: str | None) -> bool:
    return patch.shape == shape and colour in (None, patch.colour)


def _stands_right(patch: FoundObject, index: int, taken: dict[int, FoundObject], spec: PromptSpec) -> bool:
    """Whether an object taken for one requirement stands as it should to those taken before."""
    for other, there in taken.items():
        for subject, target, first, second in ((index, other, patch, there), (other, index, there, patch)):
            item = spec.include[subject]
            if item.target == target and item.relation not in relations_between(first, second):
                return False
    return True


def _cells(patch: FoundObject, grid: _Side) -> Tensor:
    """(h, w): whose centres lie in the object's circle, or within half a cell of it."""
    height, width = grid
    y = (torch.arange(height) + 0.5) / height - patch.cy
    x = (torch.arange(width) + 0.5) / width - patch.cx
    return torch.hypot(y[:, None], x[None]) <= patch.diameter / 2 + 0.5 / max(grid)


def _spec(caption: str, key: str) -> PromptSpec:
    seed = seed_of_key(key)
    if seed is None:
        raise ValueError(f"SceneReward judges scenes, whose keys are scenes/<seed>; got {key!r}")
    return spec_of_caption(sample_scene(seed), caption)
