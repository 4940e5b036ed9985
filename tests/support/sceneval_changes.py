"""Scenes that differ from a given one in exactly one thing."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from layton.scenes import SHAPES, Scene


def one_change(scene: Scene) -> dict[str, Scene]:
    """What can be changed in this scene, by the name of the change; each makes its caption false."""
    rng = np.random.default_rng(scene.seed)
    objects = scene.objects
    k = int(rng.integers(len(objects)))
    before, chosen, after = objects[:k], objects[k], objects[k + 1 :]
    free = [shape for shape in SHAPES if shape not in {o.shape for o in objects}]
    shape = free[int(rng.integers(len(free)))]
    turn = float(rng.uniform(-1, 1)) * SHAPES[shape].max_rotation
    changed = {
        "shape": replace(scene, objects=(*before, replace(chosen, shape=shape, rotation=turn), *after)),
        "one less": replace(scene, objects=(*before, *after)),
    }
    for _ in range(300):
        diameter = float(rng.uniform(0.12, 0.2))
        cx, cy = rng.uniform(diameter / 2, 1 - diameter / 2, 2).tolist()
        if all(math.hypot(cx - o.cx, cy - o.cy) > (diameter + o.diameter) / 2 + 0.01 for o in objects):
            more = replace(chosen, cx=cx, cy=cy, diameter=diameter)
            changed["one more"] = replace(scene, objects=(*objects, more))
            break
    if scene.task in ("position", "color_attr") and objects[0].colour != objects[1].colour:
        a, b = objects
        changed["colours"] = replace(scene, objects=(replace(a, colour=b.colour), replace(b, colour=a.colour)))
    if scene.relation in ("left of", "right of"):
        changed["mirrored"] = replace(scene, objects=tuple(replace(o, cx=1 - o.cx) for o in objects))
    elif scene.relation is not None:
        changed["mirrored"] = replace(scene, objects=tuple(replace(o, cy=1 - o.cy) for o in objects))
    return changed
