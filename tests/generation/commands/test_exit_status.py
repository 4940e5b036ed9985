"""Wrong usage ends with 2, and one line where the library tells it; failures end with 1 (see `layton --help`)."""

from __future__ import annotations

from pathlib import Path

import pytest

from layton.cli import main

WRONG = [
    "generate",
    "generate a --images-per-prompt 0",
    "generate a --images-per-prompt 10001",
    "generate a --batch-size 0",
    "generate a --seed -1",
    "generate a --steps 0",
    "generate a --temperature -1",
    "generate a --top-k -2",
    "generate a --top-p 0",
    "generate a --guidance-scale -1",
    "tokenize scenes --out o --count 0",
    "tokenize scenes --out o --chinese 2",
    "tokenize scenes --out o --shard-size 0",
    "tokenize scenes --out o --batch-size 0",
    "tokenize scenes --out o --max-bad -1",
    "tokenize scenes --out o --offset -1",
    "tokenize scenes --out o --text-length 9",
    "convert gpt x.pt --out o --num-tokens 0",
    "tokenize scenes --out o --text-cleaning deepfloyd",
    "convert gpt x.pt --out o --num-heads 0",
    "data check scenes",
    "evaluate sceneval --per-task 0",
    "evaluate sceneval --images-per-prompt 0",
    "evaluate sceneval --top-p 2",
    "evaluate sceneval --kind diffusion --top-k 3",
    "evaluate generation --data scenes --count 0",
    "evaluate generation --data scenes --resamples -1",
    "evaluate geneval",
    "evaluate geneval --prompts p --out o --images-per-prompt 0",
    "evaluate applications --count 0",
    "evaluate applications --edit-threshold 1",
    "evaluate sceneval --seed 99999999999999999999",
    "generate a --seed 99999999999999999999",
]
UNKNOWN = [
    "generate a --stps 3",
    "generate a --seed x",
    "tokenize scenes --out o --split tests",
    "tokenize scenes --out o --precision fp8",
    "data check o --split tests",
]


@pytest.mark.parametrize("words", WRONG)
def test_values_that_can_never_be_right(
    words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("layton: ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", UNKNOWN)
def test_what_jsonargparse_refuses(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("layton: ") and error.endswith("--help` says what there is\n") and error.count("\n") == 1


def test_an_empty_prompt_has_to_be_meant(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["generate", "  ", "--out", str(tmp_path / "o")]) == 2
    assert "--unconditional" in capsys.readouterr().err and not (tmp_path / "o").exists()
