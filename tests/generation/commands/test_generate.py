"""`layton generate`: its files, and parts of the user's own."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from laytongen_parts import tiny_generator, tiny_tokenizer, write_model

from generation.commands.generate import picture_name
from generation.generator import save_generator
from generation.pipeline import LaytonGenPipeline, PromptCutWarning
from layton.cli import main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("model") / "tiny"))


def test_names_are_plain_and_no_two_alike() -> None:
    long = "a red circle left of a blue star and " * 4
    prompts = ["a red circle", "a_red circle", "A red circle", "a red circle.", "a red circle..", long, long + "x"]
    prompts += ["", "empty", " ", "-", "cats/dogs", "birds/dogs", "../../up", "a\0b", "写真", "😀"]
    names = [picture_name(number, prompt, seed) for prompt in prompts for number in (0, 1) for seed in (0, 7)]
    assert len(set(names)) == len(names)
    assert names[0] == "0000-a_red_circle-0.png"
    for name in names:
        assert Path(name).name == name
        assert len(name.encode()) < 150
        assert picture_name(0, prompts[0], 0) == names[0]


def test_pictures_are_not_replaced_unless_told(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, figures = tmp_path / "out", tmp_path / "f.json"
    words = ["generate", "a red circle", "--model", model, "--out", str(out), "--images-per-prompt", "3"]
    assert main([*words, "--batch-size", "2", "--seed", "4", "--json", str(figures)]) == 0
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    assert sorted(first) == json.loads(figures.read_text())["files"]
    assert len(set(first.values())) == 3
    capsys.readouterr()
    assert main([*words, "--seed", "4", "--temperature", "0.5"]) == 2
    error = capsys.readouterr().err
    assert "0000-a_red_circle-4.png exists already" in error and error.count("\n") == 1
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first
    assert main(["generate", "a cat", *words[2:], "--seed", "5"]) == 0  # other pictures, other names
    assert "not in this model's vocabulary (that of Scenes: shapes, colours, places): cat\n" in capsys.readouterr().err
    assert len(list(out.iterdir())) == 6
    assert main([*words, "--seed", "4", "--temperature", "0", "--overwrite"]) == 0
    assert (out / "0000-a_red_circle-4.png").read_bytes() != first["0000-a_red_circle-4.png"]
    pipe = LaytonGenPipeline.from_pretrained(model)
    wanted = pipe("a red circle", num_images_per_prompt=3, temperature=0.0, batch_size=3, output_type="pil")
    wanted.images[0].save(tmp_path / "wanted.png")
    assert (out / "0000-a_red_circle-4.png").read_bytes() == (tmp_path / "wanted.png").read_bytes()


def test_every_setting_of_sampling_reaches_the_picture(model: str, tmp_path: Path) -> None:
    def drawn(*words: str) -> tuple[bytes, dict[str, object]]:
        out, figures = tmp_path / f"out{len(list(tmp_path.iterdir()))}", tmp_path / "f.json"
        words = ("--model", model, "--out", str(out), "--json", str(figures), "--guidance_scale", "4", *words)
        assert main(["generate", "a red circle", *words]) == 0
        settings = json.loads(figures.read_text())["settings"]
        return (out / "0000-a_red_circle-0.png").read_bytes(), settings

    plain, settings = drawn()
    assert (settings["guidance_schedule"], settings["min_entropy"]) == ("constant", 0.0)
    pictures = {plain}
    choices = {"guidance_schedule": "linear", "guidance_start": 9, "guidance_stop": 3, "min_entropy": 4.0, "top_p": 0.3}
    for name, value in {**choices, "top_k": 3}.items():
        picture, settings = drawn(f"--{name}", str(value))
        assert settings[name] == value
        pictures.add(picture)
    assert len(pictures) == 7


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_several_prompts_are_drawn_as_each_alone(model: str, tmp_path: Path, batch_size: int) -> None:
    listed, figures = tmp_path / "prompts.txt", tmp_path / "f.json"
    listed.write_text("a blue star\n\n  two red rings  \n", encoding="utf-8")
    words = ["--model", model, "--seed", "5", "--images-per-prompt", "2"]
    many = ["--prompts", str(listed), "--out", str(tmp_path / "many"), "--batch-size", str(batch_size)]
    assert main(["generate", "a red circle", *words, *many, "--json", str(figures)]) == 0
    told = json.loads(figures.read_text())
    assert told["settings"]["prompts"] == ["a red circle", "a blue star", "two red rings"]
    assert told["prompts"] == [prompt for prompt in told["settings"]["prompts"] for _ in range(2)]
    assert told["seeds"] == [5, 6] * 3 and len(told["layouts"]) == 6
    assert sorted(path.name for path in (tmp_path / "many").iterdir()) == told["files"]
    assert main(["generate", "two red rings", *words, "--out", str(tmp_path / "one")]) == 0
    for name, alone in zip(told["files"][4:], sorted((tmp_path / "one").iterdir()), strict=True):
        assert (tmp_path / "many" / name).read_bytes() == alone.read_bytes()


def test_what_to_draw_has_to_be_said(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", model, "--out", str(tmp_path / "out")]
    blank = tmp_path / "blank.txt"
    blank.write_text("\n")
    for given, status, message in (
        ([], 2, "say what to draw"),
        (["a star", " "], 2, "a prompt is empty"),
        (["--prompts", str(tmp_path / "none.txt")], 2, "no prompts file"),
        (["--prompts", str(blank)], 1, "no prompts"),
        (["a star", "a ring", "--images-per-prompt", "5001"], 2, "2 prompts times 5001"),
    ):
        assert main(["generate", *given, *words]) == status
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_cut_prompt_is_told_once_however_many_images(model: str, tmp_path: Path) -> None:
    words = ["generate", "a red circle " * 50, "--model", model, "--out", str(tmp_path / "out")]
    with pytest.warns(PromptCutWarning) as told:
        assert main([*words, "--images-per-prompt", "3", "--json", str(tmp_path / "f.json")]) == 0
    assert json.loads((tmp_path / "f.json").read_text())["cut"] == [str(told[0].message)]
    assert len([warning for warning in told if warning.category is PromptCutWarning]) == 1


def test_parts_of_ones_own_load_when_they_are_allowed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_parts.py").write_text(
        "from layton.encoder import ViTEncoder\n\n\nclass OwnEncoder(ViTEncoder):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    tokenizer, folder = tiny_tokenizer(), tmp_path / "own"
    tokenizer.encoder.__class__ = importlib.import_module("own_parts").OwnEncoder
    tokenizer.save_pretrained(folder)
    save_generator(folder / "laytongen", tiny_generator(tokenizer))
    monkeypatch.delitem(sys.modules, "own_parts")  # as in another process, which has not imported it
    with pytest.raises(ValueError, match=r"'own_parts\.OwnEncoder' is not allowed"):
        LaytonGenPipeline.from_pretrained(folder)
    assert "own_parts" not in sys.modules
    pipe = LaytonGenPipeline.from_pretrained(folder, allow=["own_parts."])
    images = torch.zeros(1, 3, 32, 32)
    assert pipe.tokenizer.encode(images).equal(tiny_tokenizer().encode(images))
    words = ["generate", "a", "--model", str(folder), "--out", str(tmp_path / "out")]
    tokenize = ["tokenize", "scenes", "--count", "2", "--tokenizer", str(folder), "--out", str(tmp_path / "t")]
    for command in (words, tokenize):
        monkeypatch.delitem(sys.modules, "own_parts")
        assert main(command) == 1
        assert "is not allowed" in capsys.readouterr().err
        assert main([*command, "--allow=own_parts."]) == 0
