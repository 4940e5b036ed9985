from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from layton.scenes import TASKS, render, sample_scene
from layton.sceneval import PromptSpec, Requirement, run_sceneval, score_folder, spec_of_scene, summarise
from layton.sceneval.folders import read_folders, write_folder
from layton.sceneval.report import PromptVerdict

TEST = 2_000_000_000
SCENES = [sample_scene(TEST + i, task=task) for i, task in enumerate(TASKS)]
PROMPTS = [spec_of_scene(scene) for scene in SCENES]
IMAGES = {prompt.prompt: render(scene, 96) for prompt, scene in zip(PROMPTS, SCENES, strict=True)}
GREY = np.full((96, 96, 3), 140, np.uint8)


def perfect(texts: Sequence[str], seeds: Sequence[int]) -> list[np.ndarray]:
    return [IMAGES[text] for text in texts]


def every_other(texts: Sequence[str], seeds: Sequence[int]) -> list[np.ndarray]:
    return [IMAGES[text] if seed % 2 == 0 else GREY for text, seed in zip(texts, seeds, strict=True)]


def spec(task: str, unseen: bool) -> PromptSpec:
    return PromptSpec(task, (Requirement("star", 1),), (), "a photo of a star", unseen)


def test_scores_are_means_of_images_then_of_tasks() -> None:
    report = summarise(
        [
            PromptVerdict(spec("counting", False), (True, True, False, False)),
            PromptVerdict(spec("counting", True), (False,)),
            PromptVerdict(spec("colors", False), (True,)),
            PromptVerdict(spec("position", False), ()),  # without images: counts nowhere
        ]
    )
    counting, colors = report.tasks
    assert (counting.score, counting.seen, counting.unseen) == (pytest.approx(0.4), 0.5, 0.0)
    assert (colors.score, colors.seen, colors.unseen) == (1.0, 1.0, None)
    assert report.overall == pytest.approx(0.7)  # not the mean over images, 0.5
    assert report.any_correct == pytest.approx(2 / 3)
    assert (report.seen, report.unseen) == (0.5, 0.0)  # only over tasks that have both
    assert (report.prompts, report.images) == (3, 6)


def test_a_perfect_and_a_half_right_generator() -> None:
    assert run_sceneval(perfect, PROMPTS, 2).overall == 1.0
    assert run_sceneval(lambda *asked: np.stack(perfect(*asked)), PROMPTS, 2).overall == 1.0
    assert run_sceneval(lambda *asked: [Image.fromarray(one) for one in perfect(*asked)], PROMPTS, 2).overall == 1.0
    half = run_sceneval(every_other, PROMPTS, 2)
    assert half.overall == 0.5
    assert half.any_correct == 1.0


def test_the_batch_size_changes_nothing() -> None:
    calls: list[tuple[str, int]] = []

    def record(texts: Sequence[str], seeds: Sequence[int]) -> list[np.ndarray]:
        calls.extend(zip(texts, seeds, strict=True))
        return [GREY] * len(texts)

    for batch_size in (1, 4, 100):
        run_sceneval(record, PROMPTS, 3, batch_size=batch_size, seed=50)
    once = calls[: len(calls) // 3]
    assert once * 3 == calls
    assert [s for _, s in once] == list(range(50, 50 + 18))
    assert [t for t, _ in once] == [p.prompt for p in PROMPTS for _ in range(3)]


def test_a_folder_on_disk_scores_the_same(tmp_path: Path) -> None:
    report = run_sceneval(every_other, PROMPTS, 2, tmp_path / "out", batch_size=5)
    assert score_folder(tmp_path / "out") == report
    first = tmp_path / "out" / "00000"
    assert json.loads((first / "metadata.jsonl").read_text())["prompt"] == PROMPTS[0].prompt
    assert sorted(f.name for f in (first / "samples").iterdir()) == ["0000.png", "0001.png"]
    with pytest.raises(ValueError, match="holds other files, which would be scored"):
        run_sceneval(every_other, PROMPTS[:1], 1, tmp_path / "out")


def test_folders_round_trip_and_strangers_are_skipped(tmp_path: Path) -> None:
    write_folder(tmp_path, 12, PROMPTS[0], [GREY])
    write_folder(tmp_path, 3, PROMPTS[1], [GREY, GREY])
    (tmp_path / "notes").mkdir()
    (tmp_path / "00003" / "grid.png").write_bytes(b"")
    (tmp_path / "00003" / "samples" / "best.png").write_bytes(b"")
    folders = list(read_folders(tmp_path))
    assert [f.spec for f in folders] == [PROMPTS[1], PROMPTS[0]]
    assert np.array_equal(folders[0].images()[1], GREY)


def test_the_report_is_json() -> None:
    report = run_sceneval(perfect, PROMPTS, 1)
    data = report.to_dict()
    assert data["overall"] == 1.0
    assert [t["task"] for t in data["tasks"]] == list(TASKS)
    assert "not comparable with GenEval" in data["protocol"]


def test_progress_is_told() -> None:
    told: list[tuple[int, int]] = []
    run_sceneval(perfect, PROMPTS, 1, batch_size=4, on_progress=lambda done, total: told.append((done, total)))
    assert told == [(4, 6), (6, 6)]


def test_faults_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="asked for 6 images, got 1"):
        run_sceneval(lambda texts, seeds: [GREY], PROMPTS, 1)
    with pytest.raises(ValueError, match="0, 4 and 16"):
        run_sceneval(perfect, [])
    with pytest.raises(ValueError, match="no image"):
        summarise([])
    with pytest.raises(ValueError, match="no prompt folders"):
        score_folder(tmp_path)
    (tmp_path / "00000").mkdir()
    (tmp_path / "00000" / "metadata.jsonl").write_text("[]")
    with pytest.raises(ValueError, match="00000"):
        score_folder(tmp_path)
