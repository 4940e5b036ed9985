"""Prompts said anew with places, by the planner of the embedded LaytonGen."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
from laytongen_parts import tiny_generator, tiny_tokenizer

from generation.generator import save_generator
from generation.model.layout import LayoutShape, PlacedObject
from generation.placed_prompts import PlacedPrompts, has_places, say_objects
from layton import assets
from layton.cli import main
from layton.ldm.text import build_text_encoder, build_tokenizer, tell_places
from layton.scenes.placed import SQUARE_TOKENS


@pytest.fixture(scope="module")
def say() -> PlacedPrompts:
    return PlacedPrompts.from_pretrained("mini")


def squares(prompt: str) -> list[tuple[float, float]]:
    return [SQUARE_TOKENS[word.rstrip(",")] for word in prompt.split() if word.rstrip(",") in SQUARE_TOKENS]


def test_layouts_are_said_in_words() -> None:
    objects = [PlacedObject(("star", "red"), 0.48, 0.4, 0.24), PlacedObject(("ring", "blue"), 0.17, 0.7, 0.183)]
    assert say_objects(objects) == "red star <24> <h7>, blue ring <18> <c12>"


def test_prompts_are_said_with_what_they_ask_for(say: PlacedPrompts) -> None:
    prompts = ["three green hearts", "a red star left of a blue ring", "", "一个红色的五角星"]
    said = say(prompts, seeds=[5, 6, 7, 8])
    assert said[0].count("green heart") == 3 and len(squares(said[0])) == 3
    star, ring = sorted(said[1].split(", "), key=lambda phrase: "ring" in phrase)
    assert star.startswith("red star ") and ring.startswith("blue ring ")
    assert squares(star)[0][0] < squares(ring)[0][0]
    assert said[2] == ""
    assert said[3].startswith("red star <")
    assert say([prompts[1]], seeds=[6]) == [said[1]]  # whatever else is asked for
    assert say([prompts[1]], seeds=[16]) != [said[1]]
    assert say([], seeds=[]) == []
    with pytest.raises(ValueError, match="2 and 1"):
        say(["a star", "a ring"], seeds=[0])


def test_a_planner_of_another_world_cannot_say_places(say: PlacedPrompts) -> None:
    planner = copy.copy(say.planner)
    planner.layout = LayoutShape((("cat", "dog"),), 2, 8)
    with pytest.raises(ValueError, match="shapes and colours of Scenes; the planner's labels begin with cat"):
        PlacedPrompts(say.text_encoder, planner)


def test_a_laytongen_without_planner_cannot_say_places(tmp_path: Path) -> None:
    save_generator(tmp_path / "g", tiny_generator(tiny_tokenizer()))
    with pytest.raises(ValueError, match="has no planner"):
        PlacedPrompts.from_pretrained(tmp_path / "g")


def test_a_model_has_places_if_its_pipeline_hears_what_its_planner_says(tmp_path: Path) -> None:
    shutil.copytree(assets.resolve("mini") / "laytongen", tmp_path / "laytongen")
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path / "ldm" / "tokenizer")
    (tmp_path / "ldm" / "model_index.json").write_text("{}")
    assert not has_places(tmp_path)
    tell_places(tokenizer, build_text_encoder(tokenizer, width=16, depth=1))
    tokenizer.save_pretrained(tmp_path / "ldm" / "tokenizer")
    assert has_places(tmp_path)
    shutil.rmtree(tmp_path / "laytongen" / "planner")
    assert not has_places(tmp_path)


def test_a_diffusion_model_is_evaluated_on_placed_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", "sceneval", "--kind", "diffusion", "--steps", "1", "--per_task", "1"]
    words += ["--images_per_prompt", "1"]
    untold = tmp_path / "untold"
    shutil.copytree(assets.resolve("mini") / "ldm", untold)
    shutil.rmtree(untold / "tokenizer")
    build_tokenizer().save_pretrained(untold / "tokenizer")
    assert main([*words, "--model", str(untold), "--planner", "mini"]) == 2
    assert "has not learnt prompts with places" in capsys.readouterr().err
    assert main([*words, "--planner", "mini", "--json", str(tmp_path / "r.json")]) == 0
    run = json.loads((tmp_path / "r.json").read_text())["run"]
    assert run["prompts_rewritten"] is True and run["planner"] == "mini" and len(run["planner_weights"]) >= 16
    assert main([*words, "--planner", "mini", "--allow", "my_parts"]) == 0  # for classes of the planner's
    assert main([*words, "--allow", "my_parts"]) == 2
    assert main([*words, "--kind", "laytongen", "--planner", "mini"]) != 0
    assert "planner" in capsys.readouterr().err
