from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from generation.evaluation.geneval import read_prompts, run_geneval, summarise_results

LINES = [
    {"tag": "single_object", "include": [{"class": "kite", "count": 1}], "prompt": "a photo of a kite"},
    {
        "tag": "position",
        "include": [
            {"class": "spoon", "count": 1},
            {"class": "sofa", "count": 1, "position": ["left of", 0]},
        ],
        "prompt": "a photo of a sofa left of a spoon",
    },
    {
        "tag": "counting",
        "include": [{"class": "kite", "count": 2}],
        "exclude": [{"class": "kite", "count": 3}],
        "prompt": "a photo of two kites",
    },
]


class Painter:
    """Images whose colour tells prompt and seed."""

    def __init__(self, most: int | None = None) -> None:
        self.calls: list[tuple[list[str], list[int]]] = []
        self.most = most

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[NDArray[np.uint8]]:
        if self.most is not None and len(self.calls) >= self.most:
            raise KeyboardInterrupt
        self.calls.append((list(prompts), list(seeds)))
        return [np.full((8, 8, 3), (len(p), s, 0), np.uint8) for p, s in zip(prompts, seeds, strict=True)]


def prompts_file(folder: Path) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in LINES) + "\n\n")
    return path


def test_the_official_layout(tmp_path: Path) -> None:
    draw, out = Painter(), tmp_path / "out"
    prompts = read_prompts(prompts_file(tmp_path))
    assert run_geneval(draw, prompts, out, settings={"top_k": 5}) == 12
    assert draw.calls == [([line["prompt"]] * 4, [42, 43, 44, 45]) for line in LINES]  # the seed is set anew
    assert sorted(path.name for path in out.iterdir()) == ["00000", "00001", "00002", "settings.json"]
    for number, line in enumerate(LINES):
        folder = out / f"{number:05d}"
        assert json.loads((folder / "metadata.jsonl").read_text()) == line
        assert (folder / "metadata.jsonl").read_text().count("\n") == 1
        assert sorted(path.name for path in (folder / "samples").iterdir()) == [f"{k:04d}.png" for k in range(4)]
        with Image.open(folder / "samples" / "0002.png") as image:
            assert image.getpixel((0, 0)) == (len(str(line["prompt"])), 44, 0)
    assert json.loads((out / "settings.json").read_text()) == {
        "top_k": 5,
        "images_per_prompt": 4,
        "seed": 42,
        "prompts": 3,
    }


def test_an_interrupted_run_goes_on_and_other_settings_are_refused(tmp_path: Path) -> None:
    out, prompts = tmp_path / "out", read_prompts(prompts_file(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        run_geneval(Painter(most=2), prompts, out, settings={"a": 1}, images_per_prompt=2)
    assert run_geneval(Painter(), prompts, out, settings={"a": 1}, images_per_prompt=2) == 2
    with pytest.raises(ValueError, match="a: stored 1, wanted 2"):
        run_geneval(Painter(), prompts, out, settings={"a": 2}, images_per_prompt=2)
    with pytest.raises(ValueError, match="another prompt"):
        run_geneval(Painter(), prompts[::-1], out, settings={"a": 1}, images_per_prompt=2)
    (out / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"without settings\.json"):
        run_geneval(Painter(), prompts, out, settings={"a": 1})


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"include": [], "prompt": 3, "tag": "x"}', '{"prompt": "a", "tag": "x"}'], ids=repr
)
def test_broken_prompt_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"p\.jsonl"):
        read_prompts(tmp_path / "p.jsonl")


def test_results_are_summed_up_as_the_official_script_does(tmp_path: Path) -> None:
    right = {0: [True] * 4, 1: [False] * 4, 2: [True, False, False, False]}
    path = tmp_path / "results.jsonl"
    lines = [
        json.dumps({"tag": LINES[i]["tag"], "correct": ok, "metadata": json.dumps(LINES[i]), "reason": ""})
        for i, group in right.items()
        for ok in group
    ]
    path.write_text("\n".join(lines))
    scores = summarise_results(path)
    assert list(scores.tasks.items()) == [("single_object", 1.0), ("counting", 0.25), ("position", 0.0)]
    assert scores.overall == pytest.approx((1 + 0 + 0.25) / 3)
    assert (scores.images, scores.correct_images, scores.prompts) == (12, 5 / 12, 3)
    assert scores.correct_prompts == pytest.approx(2 / 3)
    assert not scores.complete
    path.write_text('{"tag": "x"}')
    with pytest.raises(ValueError, match="line 1"):
        summarise_results(path)


def test_separators_that_json_allows_in_text_end_no_line(tmp_path: Path) -> None:
    odd = {**LINES[0], "prompt": "a red\u2028kite\u0085or\u2029two"}
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(odd, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [prompt.prompt for prompt in read_prompts(path)] == [odd["prompt"]]
    result = {"tag": "single_object", "correct": True, "metadata": odd["prompt"]}
    path.write_text(json.dumps(result, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert summarise_results(path).images == 1
