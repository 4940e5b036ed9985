"""Reading other people's files: tensors come out, nothing else ever happens."""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from layton.convert import ConvertError, read_checkpoint

STATE = {"a.weight": torch.arange(3.0), "b": torch.zeros(2, 2)}


class Canary:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state, "steps": 3},
        lambda state: {"state_dict": state},
        lambda state: {"module": state},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {"model": {f"module.{name}": value for name, value in state.items()}},
        lambda state: {"model": state, "args": argparse.Namespace(lr=0.1)},
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_weights_are_found_in_their_container(wrap, legacy, tmp_path):
    path = tmp_path / "file.pth"
    torch.save(wrap(STATE), path, _use_new_zipfile_serialization=not legacy)
    found = read_checkpoint(path)
    assert found.keys() == STATE.keys()
    assert all(torch.equal(found[name], value) for name, value in STATE.items())


def test_safetensors_prefix_is_dropped(tmp_path):
    path = tmp_path / "file.safetensors"
    save_file({f"state_dict.{name}": value for name, value in STATE.items()}, path)
    assert read_checkpoint(path).keys() == STATE.keys()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", ["top", "inside"])
def test_code_in_a_file_is_never_run(legacy, place, tmp_path):
    canary = tmp_path / "canary"
    loaded = Canary(canary) if place == "top" else {"model": STATE, "args": Canary(canary)}
    path = tmp_path / "file.pth"
    torch.save(loaded, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ConvertError, match="more than tensors"):
        read_checkpoint(path)
    assert not canary.exists()


def test_plain_pickle_is_refused(tmp_path):
    canary = tmp_path / "canary"
    for name in ("file.pt", "file.pkl"):
        (tmp_path / name).write_bytes(pickle.dumps({"model": Canary(canary)}))
        with pytest.raises(ConvertError):
            read_checkpoint(tmp_path / name)
    assert not canary.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"\0" * 40, b"PK\x03\x04 not an archive", b"\xff" * 64, b"hello"])
def test_foreign_files_are_refused_by_name(suffix, content, tmp_path):
    path = tmp_path / f"file{suffix}"
    path.write_bytes(content)
    with pytest.raises(ConvertError, match=r"cannot convert .*file"):
        read_checkpoint(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_cut_files_are_refused(suffix, tmp_path):
    path = tmp_path / f"file{suffix}"
    if suffix == ".pth":
        torch.save(STATE, path)
    else:
        save_file(STATE, path)
    whole = path.read_bytes()
    for part in (0.1, 0.5, 0.9):
        path.write_bytes(whole[: int(len(whole) * part)])
        with pytest.raises(ConvertError):
            read_checkpoint(path)


def test_values_that_are_no_tensors_are_named(tmp_path):
    path = tmp_path / "file.pth"
    torch.save({"model": {**STATE, "step": 3, "names": ["x"]}}, path)
    with pytest.raises(ConvertError) as error:
        read_checkpoint(path)
    assert error.value.problems == ("not a tensor: step (int)", "not a tensor: names (list)")


@pytest.mark.parametrize("loaded", [{}, {"model": {}}, [1, 2], 3])
def test_files_without_weights_are_refused(loaded, tmp_path):
    path = tmp_path / "file.pth"
    torch.save(loaded, path)
    with pytest.raises(ConvertError, match="no weights"):
        read_checkpoint(path)


def test_missing_file(tmp_path):
    with pytest.raises(ConvertError, match="no such file"):
        read_checkpoint(tmp_path / "absent.pth")


def test_averaged_weights_are_taken_where_they_are_asked_for(tmp_path):
    path, other = tmp_path / "file.pt", {name: value + 1 for name, value in STATE.items()}
    torch.save({"model": STATE, "ema": other}, path)
    for averaged, wanted in ((False, STATE), (True, other)):
        found = read_checkpoint(path, averaged=averaged)
        assert all(torch.equal(found[name], value) for name, value in wanted.items())
    torch.save({"ema": other}, path)
    assert read_checkpoint(path).keys() == STATE.keys()
    with pytest.raises(ConvertError, match="a folder"):
        read_checkpoint(tmp_path)
