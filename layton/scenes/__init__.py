"""Scenes: an endless, seeded, captioned world of shapes with exact ground truth.

``sample_scene(seed)`` lays a scene out, ``render(scene, size)`` draws it at any resolution and
``caption(scene)`` describes it. The six tasks are those of GenEval (arXiv 2310.11513).
"""

from __future__ import annotations

from layton.scenes.captions import canonical_caption, caption, vocabulary
from layton.scenes.layout import as_position, sample_scene
from layton.scenes.render import coverage, render
from layton.scenes.splits import Split, is_unseen, split_of_seed, split_seeds
from layton.scenes.world import COLOURS, SHAPES, TASKS, Background, Colour, Scene, SceneObject, Shape, Task

__all__ = [
    "COLOURS",
    "SHAPES",
    "TASKS",
    "Background",
    "Colour",
    "Scene",
    "SceneObject",
    "Shape",
    "Split",
    "Task",
    "as_position",
    "canonical_caption",
    "caption",
    "coverage",
    "is_unseen",
    "render",
    "sample_scene",
    "split_of_seed",
    "split_seeds",
    "vocabulary",
]
