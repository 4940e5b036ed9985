"""Scenes: an endless, seeded, captioned world of shapes with exact ground truth.

``sample_scene(seed)`` lays a scene out, ``render(scene, size)`` draws it at any resolution and
``caption(scene)`` describes it. The six tasks are those of GenEval (arXiv 2310.11513).
"""

from __future__ import annotations

from layton.scenes.captions import canonical_caption, caption, vocabulary
from layton.scenes.cells import (
    AHEAD_SIZES,
    SHOWN_SIZES,
    begun_cells,
    object_cells,
    objects_ahead,
    objects_placed,
    objects_shown,
)
from layton.scenes.layout import as_position, check_textures, sample_scene, texture_of, textured_seeds
from layton.scenes.render import coverage, render
from layton.scenes.splits import Split, is_unseen, scene_key, seed_of_key, split_of_seed, split_seeds
from layton.scenes.world import COLOURS, SHAPES, TASKS, Background, Colour, Scene, SceneObject, Shape, Task, Texture

__all__ = [
    "AHEAD_SIZES",
    "COLOURS",
    "SHAPES",
    "SHOWN_SIZES",
    "TASKS",
    "Background",
    "Colour",
    "Scene",
    "SceneObject",
    "Shape",
    "Split",
    "Task",
    "Texture",
    "as_position",
    "begun_cells",
    "canonical_caption",
    "caption",
    "check_textures",
    "coverage",
    "is_unseen",
    "object_cells",
    "objects_ahead",
    "objects_placed",
    "objects_shown",
    "render",
    "sample_scene",
    "scene_key",
    "seed_of_key",
    "split_of_seed",
    "split_seeds",
    "texture_of",
    "textured_seeds",
    "vocabulary",
]
