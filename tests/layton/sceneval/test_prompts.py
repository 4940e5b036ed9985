from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from layton.data.sources import say
from layton.scenes import TASKS, render, sample_scene, vocabulary
from layton.sceneval import PromptSpec, Requirement, check, make_prompts, read_prompts, write_prompts
from layton.sceneval.prompts import spec_of_caption

# Lines as in GenEval's evaluation_metadata.jsonl, with our words.
COUNTING = '{"tag": "counting", "include": [{"class": "star", "count": 2}], "exclude": [{"class": "star", "count": 3}], "prompt": "a photo of two stars"}'  # noqa: E501
POSITION = '{"tag": "position", "include": [{"class": "ring", "count": 1}, {"class": "star", "count": 1, "position": ["right of", 0]}], "prompt": "a photo of a star right of a ring"}'  # noqa: E501


def test_genevals_lines_are_read() -> None:
    counting, position = PromptSpec.from_json(COUNTING), PromptSpec.from_json(POSITION)
    assert counting.include == (Requirement("star", 2),)
    assert (counting.exclude[0].shape, counting.exclude[0].count) == ("star", 3)
    assert position.include[1] == Requirement("star", 1, None, "right of", 0)
    assert not position.exclude


@pytest.mark.parametrize("line", [COUNTING, POSITION])
def test_lines_come_back_unchanged(line: str) -> None:
    written = json.loads(PromptSpec.from_json(line).to_json())
    assert written == {**json.loads(line), "unseen": False}


def test_prompts_are_repeatable_and_balanced() -> None:
    prompts = make_prompts(20)
    assert prompts == make_prompts(20)
    assert Counter(p.task for p in prompts) == dict.fromkeys(TASKS, 20)
    unseen = Counter(p.task for p in prompts if p.unseen)
    assert unseen == dict.fromkeys(("counting", "colors", "position", "color_attr"), 4)
    words = set(vocabulary())
    for prompt in prompts:
        assert prompt.prompt.startswith("a photo of ")
        assert set(prompt.prompt.split()) <= words


def test_prompts_repeat_only_where_there_are_no_more() -> None:
    for task in TASKS:
        texts = [p.prompt for p in make_prompts(12) if p.task == task]
        assert len(set(texts)) == (8 if task == "single_object" else 12)


def test_position_prompts_say_what_they_ask_for() -> None:
    for prompt in make_prompts(10):
        if prompt.task == "position":
            target, subject = prompt.include
            body = f"{subject.colour} {subject.shape} {subject.relation}"
            assert body in prompt.prompt
            assert prompt.prompt.endswith(f"{target.colour} {target.shape}")
            assert subject.target == 0


def test_a_file_round_trip(tmp_path: Path) -> None:
    prompts = make_prompts(3)
    write_prompts(tmp_path / "deep" / "prompts.jsonl", prompts)
    assert read_prompts(tmp_path / "deep" / "prompts.jsonl") == prompts
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["prompts.jsonl"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"star", "count": 2', '"zebra", "count": 2', "zebra"),
        ('"count": 2', '"count": "two"', "two"),
        ('"count": 2', '"count": 2, "color": "mauve"', "mauve"),
        ('"count": 2', '"count": 2, "position": ["under", 0]', "under"),
        ('"count": 2', '"count": 2, "position": ["above", 4]', "include 4 of 1"),
        ('"tag": "counting"', '"tag": "juggling"', "juggling"),
        ('"prompt": "a photo of two stars"', '"prompt": 5', "prompt must be text"),
        ('"include"', '"includes"', "include must be"),
        ("{", "", "line 2"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(POSITION + "\n" + COUNTING.replace(old, new, 1) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 2") as caught:
        read_prompts(path)
    assert message in str(caught.value)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="per_task"):
        make_prompts(0)
    with pytest.raises(ValueError, match="unseen"):
        make_prompts(1, split="train")


def test_a_caption_in_any_words_gives_its_specification() -> None:
    for seed in range(60):
        scene = sample_scene(seed)
        for index in range(6):
            said = say(scene, index, chinese=0.4, reworded=0.8, related=0.5)
            spec = spec_of_caption(scene, said)
            assert spec.prompt == said
            assert check(render(scene, 256), spec).correct
    with pytest.raises(ValueError, match="no caption of scene 0"):
        spec_of_caption(sample_scene(0), "a cat")


def test_prompts_with_places_ask_for_the_same_of_the_same_scenes() -> None:
    plain, placed = make_prompts(3, split="validation"), make_prompts(3, split="validation", places=True)
    assert [replace(spec, prompt="") for spec in plain] == [replace(spec, prompt="") for spec in placed]
    for spec in placed:
        asked = sum(item.count for item in spec.include)
        assert len(spec.prompt.split(", ")) == asked and "<" in spec.prompt
