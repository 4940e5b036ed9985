"""Options that every command shares, and where run files are looked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from layton import config_folders as places
from layton.cli import _take_values
from layton.commands.reproduce import find_claim_configs


def test_allow_is_read_in_both_forms_and_taken_away() -> None:
    words = ["export", "--allow", "mine", "x.ckpt", "--allow=yours.parts"]
    assert _take_values(words, "--allow") == ["mine", "yours.parts"]
    assert words == ["export", "x.ckpt"]


def test_claims_are_found_among_installed_run_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = tmp_path / "share" / "layton" / "configs" / "reproduce" / "mlcm"
    installed.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(places, "__file__", str(tmp_path / "site" / "layton" / "config_folders.py"))
    monkeypatch.setattr(places.sysconfig, "get_path", lambda *_: str(tmp_path))
    assert find_claim_configs("mlcm") == installed
    run = installed / "mlcm.yaml"
    run.touch()
    words = [
        "--config",
        "configs/reproduce/mlcm/mlcm.yaml",
        "--data=configs/reproduce/mlcm/mlcm.yaml",
        "--x",
        "configs",
    ]
    assert places.found_configs(words) == ["--config", str(run), f"--data={run}", "--x", "configs"]
    (tmp_path / "configs/reproduce/mlcm").mkdir(parents=True)
    (tmp_path / "configs/reproduce/mlcm/mlcm.yaml").touch()  # what is here wins
    assert places.found_configs(words) == words
    assert places.found_configs(["--config", "configs/none.yaml"]) == ["--config", "configs/none.yaml"]
