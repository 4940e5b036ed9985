from __future__ import annotations

from pathlib import Path

import pytest
import torch

from layton.folder import save_tensors
from layton.staging import staged


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_new_folder_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with staged(out) as part:
        (part / "sub").mkdir()
        (part / "sub" / "b").write_text("1")
        (part / "a").write_text("2")
        assert not out.exists()
    assert names(tmp_path) == ["deep/out/a", "deep/out/sub/b"]


def test_what_else_is_in_a_folder_stays(tmp_path: Path) -> None:
    (tmp_path / "out" / "sub").mkdir(parents=True)
    for name in ("old", "sub/old", "a"):
        (tmp_path / "out" / name).write_text("before")
    with staged(tmp_path / "out") as part:
        (part / "sub").mkdir()
        (part / "sub" / "b").write_text("now")
        (part / "a").write_text("now")
    assert names(tmp_path / "out") == ["a", "old", "sub/b", "sub/old"]
    assert (tmp_path / "out" / "a").read_text() == "now"


@pytest.mark.parametrize("there", [False, True])
def test_a_failure_leaves_nothing(tmp_path: Path, there: bool) -> None:
    out = tmp_path / "out"
    if there:
        out.mkdir()
        (out / "a").write_text("before")
    with pytest.raises(RuntimeError), staged(out) as part:
        (part / "a").write_text("now")
        raise RuntimeError
    assert names(tmp_path) == (["out/a"] if there else [])
    assert out.exists() == there


def test_files_have_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    save_tensors(tmp_path / "weights.safetensors", {"x": torch.zeros(1)})
    assert (tmp_path / "weights.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
