from __future__ import annotations

import re
from dataclasses import replace

import pytest

from layton.scenes import (
    COLOURS,
    SHAPES,
    TASKS,
    Scene,
    SceneObject,
    canonical_caption,
    caption,
    sample_scene,
    vocabulary,
)
from layton.scenes.captions import noun_phrase

TEST = 2_000_000_000
VARIANTS = range(24)


def make(task: str, *kinds: tuple[str, str], relation: str | None = None) -> Scene:
    objects = tuple(SceneObject(shape, colour, 0.5, 0.5, 0.2, 0.0) for colour, shape in kinds)
    return Scene(task, objects, sample_scene(1).background, 1, relation)


def test_articles_plurals_and_numbers() -> None:
    assert noun_phrase("star", "orange") == "an orange star"
    assert noun_phrase("star", "red") == "a red star"
    assert noun_phrase("cross", None, 3) == "three crosses"
    assert noun_phrase("heart", "pink", 5) == "five pink hearts"
    assert noun_phrase("star", "orange", language="zh") == "一个橙色的五角星"
    assert noun_phrase("cross", None, 2, language="zh") == "两个十字"


@pytest.mark.parametrize(
    ("scene", "english", "chinese"),
    [
        (make("single_object", ("orange", "star")), "an orange star", "一个橙色的五角星"),
        (make("counting", *[("white", "cross")] * 3), "three white crosses", "三个白色的十字"),
        (
            make("color_attr", ("red", "star"), ("blue", "circle")),
            "a blue circle and a red star",
            "一个蓝色的圆形和一个红色的五角星",
        ),
        (
            make("position", ("blue", "circle"), ("red", "star"), relation="left of"),
            "a red star left of a blue circle",
            "一个红色的五角星在一个蓝色的圆形的左边",
        ),
        (
            make("position", ("blue", "circle"), ("red", "star"), relation="below"),
            "a blue circle above a red star",
            "一个蓝色的圆形在一个红色的五角星的上方",
        ),
    ],
)
def test_canonical_captions(scene: Scene, english: str, chinese: str) -> None:
    assert caption(scene) == canonical_caption(scene) == english
    assert caption(scene, language="zh") == chinese


def test_the_same_combination_has_one_canonical_caption() -> None:
    one = make("position", ("blue", "circle"), ("red", "star"), relation="left of")
    other = make("position", ("red", "star"), ("blue", "circle"), relation="right of")
    assert canonical_caption(one) == canonical_caption(other)
    pair = make("color_attr", ("red", "star"), ("blue", "circle"))
    assert canonical_caption(pair) == canonical_caption(replace(pair, objects=pair.objects[::-1]))


def test_variants_say_the_relation_both_ways_round() -> None:
    scene = make("position", ("blue", "circle"), ("red", "star"), relation="left of")
    said = {caption(scene, variant=v) for v in VARIANTS}
    assert "a photo of a blue circle right of a red star" in said
    assert "a red star left of a blue circle" in said
    assert "a picture of a star left of a circle" in said
    assert len(said) == 12


@pytest.mark.parametrize("task", TASKS)
def test_every_caption_is_made_of_the_vocabulary_and_has_right_articles(task: str) -> None:
    words = set(vocabulary())
    for i in range(40):
        scene = sample_scene(TEST + i, task=task)
        for variant in (None, *VARIANTS):
            english = caption(scene, variant=variant)
            assert set(english.split()) <= words
            assert set(caption(scene, language="zh", variant=variant)) <= words
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", english)
            colours = [w for w in english.split() if w in COLOURS]
            if task in ("colors", "color_attr"):
                assert sorted(colours) == sorted(o.colour for o in scene.objects)


def test_the_vocabulary_has_no_word_too_many() -> None:
    said: set[str] = set()
    for i in range(3000):
        scene = sample_scene(TEST + i)
        for language in ("en", "zh"):
            text = caption(scene, language=language, variant=i)
            said |= set(text.split() if language == "en" else text)
    assert said == set(vocabulary())
    assert {info.plural for info in SHAPES.values()} <= said


def test_wrong_arguments_are_named() -> None:
    scene = sample_scene(1)
    with pytest.raises(ValueError, match="fr"):
        caption(scene, language="fr")
    with pytest.raises(ValueError, match="-3"):
        caption(scene, variant=-3)
    with pytest.raises(ValueError, match="6"):
        noun_phrase("star", None, 6)
