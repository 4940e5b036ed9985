"""Hostile run files are refused before anything they name is imported."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from toy import RUN

import layton.run.training  # noqa: F401 (what the command itself imports must not count)
from layton.cli import main
from layton.run.files import MAX_BYTES

EVIL_MODULE = "from pathlib import Path\nPath(__file__).with_name('canary').touch()\nclass Task: pass\n"


def hostile(folder: Path) -> dict[str, str]:
    (folder / "nested.yaml").write_text("class_path: evil_module.Task\n")
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 80))
    return {
        "system": RUN.replace("toy.ToyTask", "os.system"),
        "unlisted": RUN.replace("toy.ToyTask", "evil_module.Task"),
        "unlisted part": RUN.replace("toy.ToyPart", "evil_module.Task"),
        "optimizer": RUN.replace("torch.optim.AdamW", "evil_module.Task"),
        "prefix": RUN.replace("toy.ToyTask", "torchevil.Task"),
        "unlisted torch": RUN.replace("toy.ToyTask", "torch.hub.load"),
        "callback": RUN.replace("layton.callbacks.EMA", "evil_module.Task"),
        "nested file": RUN.replace("{class_path: toy.ToyPart, init_args: {width: 4}}", "nested.yaml"),
        "python tag": "model: !!python/object/apply:os.system ['touch canary']\n",
        "own tag": "model: !evil x\n",
        "deep": "model: " + "[" * 100_000,
        "deep mapping": "model: " + "{a: " * 100_000,
        "aliases": bomb,
        "few aliases": "\n".join(bomb.splitlines()[:32]) + "\n",
        "large": "a: " + "x" * MAX_BYTES,
        "binary": "\x00\x01",
    }


@pytest.mark.parametrize("words", [["--config", "TEXT"], ["--model=TEXT"], ["--data", "TEXT"]])
def test_text_in_the_place_of_a_file_is_looked_at_likewise(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "evil_module.py").write_text(EVIL_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    for text in ("{class_path: evil_module.Task}", "a0: &a0 [x, x]\na1: &a1 [*a0, *a0]\na2: [*a1, *a1]\n"):
        assert main(["fit", *(word.replace("TEXT", text) for word in words)], allow=["toy"]) == 2
        assert "the command line" in capsys.readouterr().err
    assert "evil_module" not in sys.modules


@pytest.mark.parametrize("suffix", [".yaml", ".txt"])
@pytest.mark.parametrize("name", hostile(Path("/tmp")).keys())
def test_refused_before_any_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, suffix: str
) -> None:
    (tmp_path / "evil_module.py").write_text(EVIL_MODULE)
    (tmp_path / "torchevil.py").write_text(EVIL_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    run = tmp_path / f"run{suffix}"
    run.write_text(hostile(tmp_path)[name])
    modules, start = set(sys.modules), time.process_time()
    assert main(["fit", "--config", str(run)], allow=["toy"]) == 2
    assert time.process_time() - start < 1.0
    assert set(sys.modules) - modules == set()
    assert not (tmp_path / "canary").exists() and not (tmp_path / "runs").exists()
    error = capsys.readouterr().err
    assert error.startswith("layton: ") and error.count("\n") == 1 and len(error) < 1000


@pytest.mark.parametrize("form", ["{} {}", "{}={}"])
def test_a_file_whose_name_has_an_equals_sign_is_looked_at_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    run = tmp_path / "lr=1" / "run=2.yaml"
    run.parent.mkdir()
    run.write_text(hostile(tmp_path)["aliases"])
    assert main(["fit", *form.format("--config", run).split()], allow=["toy"]) == 2
    assert "as bombs have" in capsys.readouterr().err


def test_command_line_class_paths_are_held_to_the_same_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil_module.py").write_text(EVIL_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    run = tmp_path / "run.yaml"
    run.write_text(RUN)
    assert main(["fit", "--config", str(run), "--model", "evil_module.Task"], allow=["toy"]) == 2
    assert not (tmp_path / "canary").exists() and "evil_module" not in sys.modules
