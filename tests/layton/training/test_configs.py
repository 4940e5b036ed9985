"""Every shipped file of hardware and overlays parses against the real signatures."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from toy import write_run

from layton.cli import main

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.mark.parametrize("path", sorted((CONFIGS / "trainer").glob("*.yaml")), ids=lambda path: path.stem)
def test_trainer_files_parse(tmp_path: Path, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", str(write_run(tmp_path)), "--trainer", str(path), "--print_config"]
    assert main(["fit", *arguments], allow=["toy"]) == 0
    settings = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert f"\n  {settings[0]}\n" in capsys.readouterr().out


def test_files_named_in_a_run_file_are_found_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path)
    (tmp_path / "part.yaml").write_text("class_path: toy.ToyPart\ninit_args: {width: 11}\n")
    run.write_text(run.read_text().replace("{class_path: toy.ToyPart, init_args: {width: 4}}", "part.yaml"))
    assert main(["fit", "--config", str(run), "--print_config"], allow=["toy"]) == 0
    assert "width: 11" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted((CONFIGS / "overlay").glob("*.yaml")), ids=lambda path: path.stem)
def test_overlays_parse_over_a_run(tmp_path: Path, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = CONFIGS / "distill" / f"{path.stem.partition('_')[0]}.yaml"  # mlcm_... is laid over mlcm
    run = own if own.is_file() else write_run(tmp_path)
    assert main(["fit", "--config", str(run), "--config", str(path), "--print_config"], allow=["toy"]) == 0
    if own.is_file():  # what it changes is there
        changed = {"mlcm_version1": "refinement: null", "mlcm_perceptual": "SavedLatentPerceptualDistance"}[path.stem]
        assert capsys.readouterr().out.count(changed) == 1


@pytest.mark.parametrize("path", sorted((CONFIGS / "layton").glob("*.yaml")), ids=lambda path: path.stem)
def test_published_arrangements_parse(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = CONFIGS / "data" / "images_1024.yaml"
    assert main(["fit", "--config", str(path), "--data", str(data), "--print_config"]) == 0
    assert "ldm: models/sdxl" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted((CONFIGS / "mini").glob("*.yaml")), ids=lambda path: path.stem)
def test_embedded_runs_parse(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = CONFIGS / "data" / "scenes_256.yaml"
    assert main(["fit", "--config", str(path), "--data", str(data), "--print_config"]) == 0
    assert re.search(r"class_path: (layton|generation)\.(\w+\.)*(\w+_)?tasks?\.", capsys.readouterr().out)


@pytest.mark.parametrize("path", sorted((CONFIGS / "data").glob("*.yaml")), ids=lambda path: path.stem)
def test_data_files_parse(path: Path) -> None:
    run = CONFIGS / "mini" / "tokenizer.yaml"
    assert main(["fit", "--config", str(run), "--data", str(path), "--print_config"]) == 0


def test_run_files_that_share_a_cache_agree_on_what_is_in_it() -> None:
    """The commands of the README are given one after another in one folder: none may meet another's cache."""
    caches: dict[str, dict[str, list[str]]] = {}

    def look(part: Any, name: str) -> None:
        if isinstance(part, list):
            for item in part:
                look(item, name)
        elif isinstance(part, dict):
            if str(part.get("class_path", "")).endswith(".CachedLatents"):
                free = ("images", "fresh_captions", "in_memory", "batch_size", "folder")
                made_by = {key: value for key, value in part["init_args"].items() if key not in free}
                said = json.dumps(made_by, sort_keys=True)
                caches.setdefault(part["init_args"]["folder"], {}).setdefault(said, []).append(name)
            for item in part.values():
                look(item, name)

    for path in sorted((CONFIGS / "data").glob("*.yaml")):
        look(yaml.safe_load(path.read_text()), path.name)
    assert len(caches) > 3
    for folder, makers in caches.items():
        assert len(makers) == 1, (folder, makers)


def test_every_folder_of_run_files_is_installed() -> None:
    project = tomllib.loads((CONFIGS.parent / "pyproject.toml").read_text())
    installed = project["tool"]["setuptools"]["data-files"]
    folders = {path.parent.relative_to(CONFIGS.parent).as_posix() for path in CONFIGS.rglob("*.yaml")}
    assert {f"share/layton/{folder}" for folder in folders} <= installed.keys()
    assert all(installed[f"share/layton/{folder}"] == [f"{folder}/*.yaml"] for folder in folders)
