"""Rewards of generated images, for `generation.reward_task`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from layton.scenes import sample_scene
from layton.sceneval.checker import check
from layton.sceneval.detection import FoundObject
from layton.sceneval.prompts import spec_of_caption
from layton.sceneval.spec import PromptSpec

_SCENES = "scenes/"


class Reward(ABC):
    """How well images show what their captions ask for; needs no gradient."""

    @abstractmethod
    def score(self, images: Tensor, captions: Sequence[str], keys: Sequence[str]) -> Tensor:
        """Rewards (B,) of images (B, 3, S, S) in [-1, 1], larger is better; keys are the prompts' names."""


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

    def score(self, images: Tensor, captions: Sequence[str], keys: Sequence[str]) -> Tensor:
        """Rewards (B,) float32 in [0, 1].

        Raises:
            ValueError: If a key names no scene, or a caption does not hold for its scene.
        """
        pixels = images.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        rows = zip(pixels, captions, keys, strict=True)
        return torch.tensor([self._score(np.ascontiguousarray(image), text, key) for image, text, key in rows])

    def _score(self, image: np.ndarray, caption: str, key: str) -> float:
        name = key.removeprefix(_SCENES)
        if name == key or not name.isdecimal():
            raise ValueError(f"SceneReward judges scenes, whose keys are {_SCENES}<seed>; got {key!r}")
        spec = spec_of_caption(sample_scene(int(name)), caption)
        verdict = check(image, spec)
        return (1 - self.partial) * verdict.correct + self.partial * overlap(verdict.found, spec)


def overlap(found: Sequence[FoundObject], spec: PromptSpec) -> float:
    """Objects that are asked for and there, by shape and colour, over the larger of both numbers; in [0, 1]."""
    right = sum(
        min(item.count, sum(f.shape == item.shape and item.colour in (None, f.colour) for f in found))
        for item in spec.include
    )
    return right / max(len(found), sum(item.count for item in spec.include))
