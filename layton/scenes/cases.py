"""Cases of editing and inpainting on scenes: everything here is a pure function of a scene's seed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from layton.scenes.layout import sample_scene
from layton.scenes.splits import Split, split_seeds
from layton.scenes.world import COLOURS, Scene, SceneObject

HOLE_MARGIN = 0.02  # of the side, around an object's circle


@dataclass(frozen=True, slots=True)
class EditCase:
    """A scene, and what it is to become."""

    scene: Scene
    wanted: Scene
    changed: tuple[int, ...]  # indices of the objects whose colour changes

    def recoloured(self) -> list[SceneObject]:
        """Those objects, in their new colour."""
        return [self.wanted.objects[index] for index in self.changed]


@dataclass(frozen=True, slots=True)
class Hole:
    """A scene, and which of its objects is left out."""

    scene: Scene
    missing: int

    @property
    def item(self) -> SceneObject:
        """The object."""
        return self.scene.objects[self.missing]

    def without(self) -> Scene:
        """The scene without the object."""
        kept = tuple(item for index, item in enumerate(self.scene.objects) if index != self.missing)
        return replace(self.scene, objects=kept)

    def upright(self) -> Scene:
        """The scene with the object upright."""
        objects = list(self.scene.objects)
        objects[self.missing] = replace(self.item, rotation=0.0)
        return replace(self.scene, objects=tuple(objects))

    def box(self, size: int) -> tuple[slice, slice]:
        """Rows and columns of the hole in an image of ``size`` pixels."""
        reach = self.item.diameter / 2 + HOLE_MARGIN
        spans = ((centre - reach, centre + reach) for centre in (self.item.cy, self.item.cx))
        rows, columns = (slice(max(0, math.floor(a * size)), min(size, math.ceil(b * size))) for a, b in spans)
        return rows, columns


def edit_case(seed: int) -> EditCase:
    """Another colour for what a scene's caption names first or second: one object, or all of a counted group."""
    rng = np.random.default_rng((seed, 1))
    scene = sample_scene(seed)
    counted = len({(item.shape, item.colour) for item in scene.objects}) == 1
    changed = tuple(range(len(scene.objects))) if counted else (int(rng.integers(2)),)
    free = [name for name in COLOURS if name not in {item.colour for item in scene.objects}]
    colour = free[int(rng.integers(len(free)))]
    objects = tuple(
        replace(item, colour=colour) if index in changed else item for index, item in enumerate(scene.objects)
    )
    return EditCase(scene, replace(scene, objects=objects), changed)


def hole_of(seed: int) -> Hole | None:
    """A hole around one object that touches no other one's circle; None if the scene has none."""
    scene = sample_scene(seed)
    order = np.random.default_rng((seed, 2)).permutation(len(scene.objects))
    return next((hole for hole in (Hole(scene, int(i)) for i in order) if _is_clear(hole)), None)


def holes(split: Split, count: int) -> Iterator[Hole]:
    """The first holes of a split."""
    found = 0
    for seed in split_seeds(split, 20 * count):
        hole = hole_of(seed)
        if hole is not None:
            yield hole
            found += 1
        if found == count:
            return


def _is_clear(hole: Hole) -> bool:
    """Whether the hole's square touches no other object's circle."""
    reach = hole.item.diameter / 2 + HOLE_MARGIN
    others = (item for index, item in enumerate(hole.scene.objects) if index != hole.missing)
    return all(
        math.hypot(max(abs(o.cx - hole.item.cx) - reach, 0), max(abs(o.cy - hole.item.cy) - reach, 0)) > o.diameter / 2
        for o in others
    )
