"""Captions that are wrong in exactly one thing: hard negatives for whoever learns to tell them from true ones."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, get_args

from layton.scenes.captions import CHINESE_PREFIXES, INVERSE, PREFIXES, Wording, describe
from layton.scenes.splits import is_unseen, split_of_seed
from layton.scenes.world import COLOURS, MAX_OBJECTS, SHAPES, Colour, Scene, SceneObject, Shape

Change = Literal["count", "colour", "relation", "shape", "kind"]
CHANGES: Final[tuple[Change, ...]] = get_args(Change)


@dataclass(frozen=True, slots=True)
class Captions:
    """What is said of one scene.

    Attributes:
        true: A caption that holds.
        wrong: Captions that do not, each by the one thing that was changed.
    """

    true: str
    wrong: dict[Change, str]


def captions_of(scene: Scene, rng: random.Random, *, chinese: float = 0.0, colourless: float = 0.2) -> Captions:
    """A true caption and its wrong neighbours, all worded alike, so that nothing but the fact tells them apart.

    Args:
        scene: What is shown.
        rng: Chooses wording, language and the changes.
        chinese: Share in Chinese.
        colourless: Share that leaves out colours, where nothing changes them.
    """
    language: Literal["en", "zh"] = "zh" if rng.random() < chinese else "en"
    prefix = rng.choice(PREFIXES if language == "en" else CHINESE_PREFIXES)
    swapped = rng.random() < 0.5
    coloured = scene.task in ("colors", "color_attr") or rng.random() >= colourless
    wording = Wording(language, prefix, coloured, swapped)
    changed = {change: altered(scene, change, rng) for change in CHANGES if coloured or change != "colour"}
    training = split_of_seed(scene.seed) == "train"  # where no combination that is kept out of it is named either
    wrong = {
        change: describe(other, wording)
        for change, other in changed.items()
        if other is not None and not (training and is_unseen(other))
    }
    return Captions(describe(scene, wording), wrong)


def contrary_caption(scene: Scene, wording: Wording, changes: Sequence[Change], rng: random.Random) -> str | None:
    """A caption that is wrong in one of these things, worded like the true one.

    Args:
        scene: What is shown.
        wording: How it is said.
        changes: What may be wrong; one that applies is chosen.
        rng: Chooses.

    Returns:
        The caption; None if no change applies, or each would name a combination that is kept out of training.
    """
    training = split_of_seed(scene.seed) == "train"
    for change in rng.sample(list(changes), len(changes)):
        other = altered(scene, change, rng)
        if other is None or (change == "colour" and not wording.coloured) or (training and is_unseen(other)):
            continue
        return describe(other, wording)
    return None


def altered(scene: Scene, change: Change, rng: random.Random) -> Scene | None:
    """The scene that a caption wrong in one thing would describe; None where the change does not apply.

    One object or one kind of object: its number, colour or shape becomes another. Two kinds: colours are exchanged
    (one replaced where they are equal), the relation is mirrored, or one shape is replaced by one that is not there.
    "kind": one of two objects goes, or another one joins a single object.
    """
    if change == "relation":
        return None if scene.relation is None else replace(scene, relation=INVERSE[scene.relation])
    one_kind = scene.task in ("single_object", "colors", "counting")
    objects = scene.objects
    if change == "count":
        return _recounted(scene, rng) if one_kind else None
    if change == "kind":
        return _with_other_kinds(scene, one_kind, rng)
    if change == "shape":
        others = [shape for shape in SHAPES if shape not in {item.shape for item in objects}]
        return replace(scene, objects=_with(objects, one_kind, rng, shape=rng.choice(others)))
    first, last = objects[0], objects[-1]
    if not one_kind and first.colour != last.colour:
        exchanged = (replace(first, colour=last.colour), replace(last, colour=first.colour))
        return replace(scene, objects=exchanged)
    colours = [colour for colour in COLOURS if colour != first.colour]
    return replace(scene, objects=_with(objects, one_kind, rng, colour=rng.choice(colours)))


def _recounted(scene: Scene, rng: random.Random) -> Scene:
    count = len(scene.objects)
    other = rng.choice([number for number in (count - 1, count + 1) if 1 <= number <= MAX_OBJECTS])
    return replace(scene, task="counting" if other > 1 else "colors", objects=scene.objects[:1] * other)


def _with_other_kinds(scene: Scene, one_kind: bool, rng: random.Random) -> Scene | None:
    """Without one of two objects, or with another beside a single one; None for several of one kind."""
    first, *others = scene.objects
    if not one_kind:
        return replace(scene, task="colors", relation=None, objects=(rng.choice([first, *others]),))
    if others:
        return None
    shape = rng.choice([name for name in SHAPES if name != first.shape])
    joined = (first, replace(first, shape=shape, colour=rng.choice(list(COLOURS))))
    return replace(scene, task="color_attr", objects=joined)


def _with(
    objects: tuple[SceneObject, ...],
    one_kind: bool,
    rng: random.Random,
    *,
    shape: Shape | None = None,
    colour: Colour | None = None,
) -> tuple[SceneObject, ...]:
    """All objects of a kind, or one of two, with another shape or colour."""
    chosen = range(len(objects)) if one_kind else (rng.randrange(len(objects)),)
    return tuple(
        replace(item, shape=shape or item.shape, colour=colour or item.colour) if number in chosen else item
        for number, item in enumerate(objects)
    )
