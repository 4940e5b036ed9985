"""Captions in English and Chinese, and every word they can contain.

The *canonical* caption names all attributes once, in one order, so that scenes which show the same
combination share it ("a red star right of a blue ring" is "a blue ring left of a red star"). Variants are
the ways a person would say it: with or without "a photo of", with or without colours, either order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from layton.scenes.world import (
    CHINESE_COLOURS,
    COLOURS,
    RELATIONS,
    SHAPES,
    Colour,
    Relation,
    Scene,
    SceneObject,
    Shape,
    Task,
)

Language = Literal["en", "zh"]

NUMBERS: Final = ("zero", "one", "two", "three", "four", "five")
CHINESE_NUMBERS: Final = ("零", "一", "两", "三", "四", "五")
PREFIXES: Final = ("", "a photo of ", "a picture of ")
CHINESE_PREFIXES: Final = ("", "一张照片，", "一张图片，")
CHINESE_RELATIONS: Final[dict[Relation, str]] = {
    "left of": "左边",
    "right of": "右边",
    "above": "上方",
    "below": "下方",
}
INVERSE: Final[dict[Relation, Relation]] = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
}
# Tasks whose point is the colour always name it; the others name it in this many of four variants.
_COLOUR_IN_QUARTERS: Final[dict[Task, int]] = {
    "single_object": 2,
    "two_object": 2,
    "counting": 2,
    "position": 2,
    "colors": 4,
    "color_attr": 4,
}
_SHAPE_ORDER: Final[dict[Shape, int]] = {name: i for i, name in enumerate(SHAPES)}
_COLOUR_ORDER: Final[dict[Colour, int]] = {name: i for i, name in enumerate(COLOURS)}


def noun_phrase(shape: Shape, colour: Colour | None, count: int = 1, *, language: Language = "en") -> str:
    """A shape with its colour and number: "an orange star", "three crosses".

    Args:
        shape: what it is.
        colour: its colour, or None to leave it out.
        count: how many, 1 to 5.
        language: "en" or "zh".

    Returns:
        The phrase.

    Raises:
        ValueError: if ``count`` is not in 1..5 or the language is unknown.
    """
    if not 1 <= count < len(NUMBERS):
        raise ValueError(f"count must be 1 to {len(NUMBERS) - 1}, got {count}")
    if language == "zh":
        adjective = f"{CHINESE_COLOURS[colour]}的" if colour else ""
        return f"{CHINESE_NUMBERS[count]}个{adjective}{SHAPES[shape].chinese}"
    if language != "en":
        raise ValueError(f"language must be 'en' or 'zh', got {language!r}")
    words: list[str] = [colour] if colour else []
    words.append(shape if count == 1 else SHAPES[shape].plural)
    first = NUMBERS[count] if count > 1 else ("an" if words[0][0] in "aeiou" else "a")
    return " ".join([first, *words])


def caption(scene: Scene, *, language: Language = "en", variant: int | None = None) -> str:
    """Describe a scene.

    Args:
        scene: what to describe.
        language: "en" or "zh".
        variant: None gives the canonical caption. An integer >= 0 picks one of the other true ways to say it,
            as a pure function of the integer (a training loop passes a fresh one for each epoch).

    Returns:
        One line without a full stop.

    Raises:
        ValueError: if the language is unknown or ``variant`` is negative.
    """
    return describe(scene, wording(scene, language=language, variant=variant))


@dataclass(frozen=True, slots=True)
class Wording:
    """How a scene is described, whatever it shows.

    Attributes:
        language: "en" or "zh".
        prefix: What stands in front: "a photo of ".
        coloured: Whether colours are named.
        swapped: Whether ``objects[1]`` is named first (of two objects; a relation is turned round with them).
    """

    language: Language = "en"
    prefix: str = ""
    coloured: bool = True
    swapped: bool = False


def wording(scene: Scene, *, language: Language = "en", variant: int | None = None) -> Wording:
    """The wording of `caption`, from the same arguments.

    Raises:
        ValueError: if ``variant`` is negative.
    """
    if variant is None:
        return Wording(language, swapped=_canonical_swap(scene))
    if variant < 0:
        raise ValueError(f"variant must be >= 0, got {variant}")
    # Mixed digits of one number: prefix (3), order (2), colours (4).
    rest, prefix = divmod(variant, len(PREFIXES))
    rest, swapped = divmod(rest, 2)
    coloured = rest % 4 < _COLOUR_IN_QUARTERS[scene.task]
    return Wording(language, (PREFIXES if language == "en" else CHINESE_PREFIXES)[prefix], coloured, bool(swapped))


def canonical_caption(scene: Scene) -> str:
    """The English caption that names a scene's attribute combination; what the splits hash."""
    return caption(scene)


def _order(item: SceneObject) -> tuple[int, int]:
    return _SHAPE_ORDER[item.shape], _COLOUR_ORDER[item.colour]


def _canonical_swap(scene: Scene) -> bool:
    """Whether the canonical caption names ``objects[1]`` first."""
    if len({item.shape for item in scene.objects}) < 2:
        return False
    if scene.relation is not None:
        return scene.relation in ("left of", "above")  # objects[1] <relation> objects[0]
    return _order(scene.objects[1]) < _order(scene.objects[0])


def describe(scene: Scene, wording: Wording) -> str:
    """Describe a scene in a chosen way.

    Args:
        scene: what to describe.
        wording: how.

    Returns:
        One line without a full stop.

    Raises:
        ValueError: if the language is unknown.
    """
    language = wording.language
    first = scene.objects[0]
    if scene.task in ("single_object", "colors", "counting"):
        colour = first.colour if wording.coloured else None
        return wording.prefix + noun_phrase(first.shape, colour, len(scene.objects), language=language)
    pair = scene.objects[1::-1] if wording.swapped else scene.objects[:2]
    left, right = (noun_phrase(o.shape, o.colour if wording.coloured else None, language=language) for o in pair)
    if scene.relation is None:
        return wording.prefix + (f"{left} and {right}" if language == "en" else f"{left}和{right}")
    relation = scene.relation if wording.swapped else INVERSE[scene.relation]
    if language == "en":
        return f"{wording.prefix}{left} {relation} {right}"
    return f"{wording.prefix}{left}在{right}的{CHINESE_RELATIONS[relation]}"


def vocabulary() -> list[str]:
    """Every English word and every Chinese character that a caption can contain, sorted, for a tokenizer."""
    english = {"a", "an", "and", *NUMBERS[2:], *COLOURS, *SHAPES}
    english |= {info.plural for info in SHAPES.values()}
    for phrase in (*PREFIXES, *RELATIONS):
        english |= set(phrase.split())
    chinese = set("和在的个").union(*CHINESE_NUMBERS[1:], *CHINESE_PREFIXES, *CHINESE_RELATIONS.values())
    chinese = chinese.union(*CHINESE_COLOURS.values(), *(info.chinese for info in SHAPES.values()))
    return sorted(english | chinese)
