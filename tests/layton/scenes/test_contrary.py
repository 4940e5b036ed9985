"""Captions that are wrong in exactly one thing."""

from __future__ import annotations

import random

import pytest

from layton.data.sources import say, say_contrary
from layton.scenes import TASKS, is_unseen, sample_scene
from layton.scenes.captions import Wording, describe
from layton.scenes.contrary import CHANGES, altered, captions_of, contrary_caption


def facts(scene) -> dict[str, object]:
    """What a scene's caption says, one entry for each kind of change."""
    return {
        "count": len(scene.objects),
        "colour": [item.colour for item in scene.objects],
        "shape": [item.shape for item in scene.objects],
        "relation": scene.relation,
    }


@pytest.mark.parametrize("task", TASKS)
def test_exactly_one_thing_is_changed(task) -> None:
    applied = set()
    for seed in range(30):
        scene, rng = sample_scene(seed, task=task), random.Random(seed)
        for change in CHANGES:
            other = altered(scene, change, rng)
            if other is None or change == "kind":
                continue
            applied.add(change)
            before, after = facts(scene), facts(other)
            if change == "count":  # one kind of object: the lists grow or shrink with it
                both = (before, after)
                before, after = ({k: v[:1] if isinstance(v, list) else v for k, v in d.items()} for d in both)
            assert [key for key in before if before[key] != after[key]] == [change]
            if change == "shape":
                new = set(after["shape"]) - set(before["shape"])
                assert len(new) == 1
            if change == "colour" and len(set(before["colour"])) == 2:
                assert after["colour"] == before["colour"][::-1]
    one_kind = task in ("single_object", "colors", "counting")
    assert applied == {"colour", "shape"} | ({"count"} if one_kind else set()) | (
        {"relation"} if task == "position" else set()
    )


@pytest.mark.parametrize("task", TASKS)
def test_one_of_two_goes_or_another_joins_a_single_one(task) -> None:
    for seed in range(30):
        scene = sample_scene(seed, task=task)
        other = altered(scene, "kind", random.Random(seed))
        if task == "counting":
            assert other is None
            continue
        assert other is not None and {len(scene.objects), len(other.objects)} == {1, 2}
        kinds = [{(item.shape, item.colour) for item in each.objects} for each in (scene, other)]
        assert min(kinds, key=len) < max(kinds, key=len)
        assert other.relation is None
        assert (" and " in describe(other, Wording())) == (len(scene.objects) == 1)


def test_captions_differ_from_the_true_one_and_are_worded_alike() -> None:
    some = 0
    for seed in range(200):
        said = captions_of(sample_scene(seed), random.Random(seed), chinese=0.2)
        assert said == captions_of(sample_scene(seed), random.Random(seed), chinese=0.2)
        assert said.true not in said.wrong.values()
        some += bool(said.wrong)
        prefixed = said.true.startswith("a photo of ")
        assert all(text.startswith("a photo of ") == prefixed for text in said.wrong.values())
    assert some > 190


def test_a_contrary_caption_is_worded_like_the_true_one_and_the_seed_chooses() -> None:
    shares = {"chinese": 0.2, "reworded": 0.8, "related": 0.5}
    different = set()
    for seed in range(300):
        scene = sample_scene(seed)
        true, false = say(scene, 1, **shares), say_contrary(scene, 1, ["count", "relation"], **shares)
        assert false == say_contrary(scene, 1, ["count", "relation"], **shares)
        different.add(false == say_contrary(scene, 2, ["count", "relation"], **shares))
        assert false != true
        assert false.isascii() == true.isascii() or not false
        assert false.startswith("a photo of ") == true.startswith("a photo of ") or not false
    assert different == {True, False}


def test_combinations_that_training_never_sees_are_not_named_as_contrary() -> None:
    refused = 0
    for seed in range(400):
        scene = sample_scene(seed, task="counting")
        known = {describe(altered(scene, "count", random.Random(n)), Wording()) for n in range(8)}
        seen = {
            describe(one, Wording())
            for n in range(8)
            if not is_unseen(one := altered(scene, "count", random.Random(n)))
        }
        said = {contrary_caption(scene, Wording(), ["count"], random.Random(n)) for n in range(8)} - {None}
        assert said <= seen
        refused += known != seen
    assert refused > 10


@pytest.mark.parametrize("task", ["single_object", "counting"])
def test_no_caption_where_no_change_applies(task) -> None:
    scene = sample_scene(3, task=task)
    assert contrary_caption(scene, Wording(coloured=False), ["relation", "colour"], random.Random(0)) is None
    assert say_contrary(scene, 0, ["relation"]) == ""


def test_what_is_kept_out_of_training_is_named_in_no_wrong_caption_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layton.scenes.contrary.is_unseen", lambda scene: True)
    for seed in range(20):
        assert not captions_of(sample_scene(seed), random.Random(seed)).wrong
        assert captions_of(sample_scene(seed + 2 * 10**9), random.Random(seed)).wrong
