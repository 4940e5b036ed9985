"""`layton pairs`: a teacher's pairs on disk, made once and gone on with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from command_tools import Run

from distill.methods.pairs import TeacherSolver
from layton.data.prompts import SceneCaptions
from layton.distillation.pair_data import TeacherPairs

CONFIGS = Path(__file__).parents[3] / "configs" / "distill"


def test_pairs_are_made_rebuilt_from_their_seeds_and_not_made_twice(
    run: Run, fails: Run, pipeline: Path, tmp_path: Path
) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "pairs"
    prompts.write_text("a red star\ntwo blue rings\n")
    options = [
        "--prompts",
        prompts,
        "--split",
        "all",
        "--count",
        4,
        "--steps",
        2,
        "--part-size",
        2,
        "--batch-size",
        2,
    ]
    assert "4 pairs" in run("pairs", pipeline, "--out", out, *options)
    first = {path.name: path.read_bytes() for path in sorted(out.iterdir())}
    assert "4 pairs" in run("pairs", pipeline, "--out", out, *options)
    assert {path.name: path.read_bytes() for path in sorted(out.iterdir())} == first
    assert "at least 1" in run("pairs", pipeline, "--out", out, "--steps", 0, status=2)
    fails("pairs", pipeline, "--out", out, *options[:-6], "--steps", 3)  # pairs of another rule lie there


def test_pairs_are_made_as_distillation_wants_them(
    run: Run, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[tuple[SceneCaptions, TeacherSolver, str | None]] = []

    def made(texts: SceneCaptions, *args: Any, negative_prompt: str | None, **options: Any) -> list[int]:
        said.append((texts, args[2]((4, 2, 2)).solver, negative_prompt))
        return [0]

    monkeypatch.setattr("layton.distillation.pair_data.open_or_make", made)
    run("pairs", pipeline, "--out", tmp_path, "--negative-prompt", "grey")
    monkeypatch.setattr("layton.commands.distill.hears_places", lambda _: True)
    monkeypatch.setattr("layton.commands.distill.hears_guidance", lambda _: True)
    run("pairs", pipeline, "--out", tmp_path)
    (plain, rule, away), (placed, unguided, _) = said
    assert (rule.guidance_scale, unguided.guidance_scale, away) == (5.0, 1.0, "grey")
    assert "<" in placed.sample(0, seed=0)["caption"] and "<" not in plain.sample(0, seed=0)["caption"]


def test_a_run_file_finds_the_pairs_that_the_command_made(run: Run, pipeline: Path, tmp_path: Path) -> None:
    options = ["--count", 4, "--steps", 2, "--guidance-scale", 1.0, "--solver", "euler"]
    assert "4 pairs" in run("pairs", pipeline, "--out", tmp_path / "pairs", *options)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "pairs").iterdir()}
    given = yaml.safe_load((CONFIGS / "reflow.yaml").read_text())["data"]["init_args"]["train"][0]["init_args"]
    said = {**given["prompts"]["init_args"], "length": 4}
    made = {"num_pairs": 4, "solver": TeacherSolver("euler", 2, 1.0)}
    again = TeacherPairs(SceneCaptions(**said), pipeline=str(pipeline), folder=str(tmp_path / "pairs"), **made)
    assert len(again) == 4
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "pairs").iterdir()} == before
