"""Options that every command shares, and where run files are looked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from layton.cli import _take_values
from layton.commands.reproduce import find_claim_configs
from layton.run import config_folders as places
from layton.run.files import nulls_as_files
from layton.run.training import run


def test_allow_is_read_in_both_forms_and_taken_away() -> None:
    words = ["export", "--allow", "mine", "x.ckpt", "--allow=yours.parts"]
    assert _take_values(words, "--allow") == ["mine", "yours.parts"]
    assert words == ["export", "x.ckpt"]


def test_claims_are_found_among_installed_run_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = tmp_path / "share" / "layton" / "configs" / "reproduce" / "mlcm"
    installed.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(places, "__file__", str(tmp_path / "site" / "layton" / "run" / "config_folders.py"))
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


@pytest.mark.parametrize("form", [["=null"], ["", "None"]])
def test_a_part_of_a_method_is_left_out_on_the_command_line(
    form: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    option, *value = form
    words = [f"--model.init_args.method.init_args.refinement{option}", *value]
    with pytest.raises(SystemExit) as stop:
        run("fit", ["--config", "configs/distill/mlcm.yaml", *words, "--print_config"])
    assert not stop.value.code
    method = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["method"]
    assert method["class_path"].endswith("MLCM")
    assert method["init_args"]["refinement"] is None
    assert method["init_args"]["progression"]["segments"] == [8], "the rest of the method stays"


def test_other_words_stay_as_they_are() -> None:
    words = ["--model.init_args.adapter=null", "--a.init_args.b.init_args.c=1", "--a.init_args.b.init_args.c", "2", "x"]
    assert nulls_as_files(words) == words
