"""`layton reproduce` on a tiny teacher: whole measurements, resumed ones, refused ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from layton.cli import main

sys.path.insert(0, str(Path(__file__).parent))
from reproduce_tools import save_teacher, tiny_configs

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),
]
ARM_STEP = {"lcm": 2 * 6, "mlcm": 2 * 19}  # most forward-equivalents that one step of two samples costs


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def reproduce(claim: str, teacher: Path, *more: str) -> int:
    return main(["--debug", "reproduce", claim, "--quick=true", "--out=out", "--pipeline", str(teacher), *more])


def test_mlcm_against_lcm(tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_configs(tmp_path, "mlcm", budget=80)
    assert reproduce("mlcm", teacher, "--json=result.json") == 0
    print(capsys.readouterr())
