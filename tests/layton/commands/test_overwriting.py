"""What a user has is not lost to a command's result."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

TOLD = "exists already"


class Run(Protocol):
    def __call__(self, *words: object, status: int = 0) -> str: ...


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_pictures_are_not_replaced_by_those_made_of_them(
    run: Run, fails: Run, tokenizer: Path, photos: Path, tmp_path: Path
) -> None:
    before, codes = bytes_of(photos), tmp_path / "codes.safetensors"
    picture = next(photos.glob("*.png"))
    run("encode", picture, "--out", codes, "--tokenizer", tokenizer)
    assert TOLD in fails("reconstruct", picture, "--out", photos, "--tokenizer", tokenizer, status=2)
    assert TOLD in fails("decode", codes, "--out", photos, "--tokenizer", tokenizer, status=2)
    assert TOLD in fails("edit", picture, "a red star", "--out", picture, status=2)
    assert bytes_of(photos) == before
    run("decode", codes, "--out", tmp_path / "out", "--tokenizer", tokenizer)
    run("decode", codes, "--out", tmp_path / "out", "--tokenizer", tokenizer, "--overwrite")


def test_codes_do_not_replace_what_is_no_codes(
    run: Run, fails: Run, tokenizer: Path, photos: Path, tmp_path: Path
) -> None:
    before, picture = bytes_of(photos), next(photos.glob("*.png"))
    assert "written as safetensors" in fails("encode", picture, "--out", picture, "--tokenizer", tokenizer, status=2)
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"somebody's")
    assert TOLD in fails("encode", picture, "--out", weights, "--tokenizer", tokenizer, status=2)
    assert bytes_of(photos) == before and weights.read_bytes() == b"somebody's"
    codes = tmp_path / "codes.safetensors"
    run("encode", picture, "--out", codes, "--tokenizer", tokenizer)
    assert TOLD in fails("encode", picture, "--out", codes, "--tokenizer", tokenizer, status=2)
    run("encode", picture, "--out", codes, "--tokenizer", tokenizer, "--overwrite")
