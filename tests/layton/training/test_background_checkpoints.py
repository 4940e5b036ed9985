"""Checkpoints that are written while training goes on."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from toy import ToyPart, ToyTask, toy_data

from layton.callbacks import SafeCheckpoint
from layton.callbacks import checkpoint_io as files
from layton.callbacks.checkpoint_io import BackgroundCheckpointIO, CheckpointError, SafeCheckpointIO


def state(step: int) -> dict[str, Any]:
    return {"global_step": step, "state_dict": {"w": torch.full((1000,), float(step))}}


class Gate:
    """Holds the writer back until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.fail, write = threading.Event(), False, files._write_synced

        def held(checkpoint: dict[str, Any], path: Path) -> tuple[str, int]:
            assert self.open.wait(20)
            if self.fail:
                raise OSError("no room")
            return write(checkpoint, path)

        monkeypatch.setattr(files, "_write_synced", held)


def test_training_goes_on_meanwhile_and_the_file_is_of_the_moment_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, io, checkpoint = Gate(monkeypatch), BackgroundCheckpointIO(), state(1)
    io.save_checkpoint(checkpoint, tmp_path / "step=1.ckpt")  # returns at once
    checkpoint["state_dict"]["w"] += 5
    assert not (tmp_path / "step=1.ckpt").exists()
    gate.open.set()
    io.teardown()
    loaded = SafeCheckpointIO().load_checkpoint(tmp_path / "step=1.ckpt")
    assert bool((loaded["state_dict"]["w"] == 1).all())


@pytest.mark.parametrize("fail", [False, True])
def test_an_old_file_goes_only_when_the_new_one_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail: bool
) -> None:
    old, new = tmp_path / "step=1.ckpt", tmp_path / "step=2.ckpt"
    SafeCheckpointIO().save_checkpoint(state(1), old)
    gate, io = Gate(monkeypatch), BackgroundCheckpointIO()
    gate.fail = fail
    io.save_checkpoint(state(2), new)
    io.remove_checkpoint(old)
    assert old.exists() and not new.exists()
    gate.open.set()
    if fail:
        with pytest.raises(CheckpointError, match=r"step=2\.ckpt"):
            io.teardown()
    else:
        io.teardown()
    assert (old.exists(), new.exists()) == (fail, not fail)


def test_an_error_is_raised_at_the_next_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, io = Gate(monkeypatch), BackgroundCheckpointIO()
    gate.fail = True
    io.save_checkpoint(state(1), tmp_path / "step=1.ckpt")
    gate.open.set()
    with pytest.raises(CheckpointError, match=r"step=1\.ckpt"):
        io.save_checkpoint(state(2), tmp_path / "step=2.ckpt")
    gate.fail = False
    io.save_checkpoint(state(3), tmp_path / "step=3.ckpt")
    io.teardown()
    assert [path.name for path in sorted(tmp_path.glob("*.ckpt"))] == ["step=3.ckpt"]


def test_a_run_leaves_the_same_files(tmp_path: Path) -> None:
    for name in ("waiting", "background"):
        torch.manual_seed(0)
        saving = SafeCheckpoint(every_n_train_steps=2, keep=2, in_background=name == "background")
        other = SafeCheckpoint(every_n_train_steps=3, keep=1, dirpath=str(tmp_path / f"{name}-other"))
        trainer = Trainer(
            default_root_dir=tmp_path / name,
            accelerator="cpu",
            max_steps=6,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[saving, other],
        )
        trainer.fit(ToyTask(part=ToyPart(), optimizer=partial(torch.optim.AdamW, lr=1e-2)), toy_data())
    found = {name: sorted((tmp_path / name / "checkpoints").glob("*.ckpt")) for name in ("waiting", "background")}
    assert [path.name for path in found["background"]] == [path.name for path in found["waiting"]]
    assert len(found["waiting"]) == 2
    for pair in zip(*found.values(), strict=True):
        one, two = (SafeCheckpointIO().load_checkpoint(path) for path in pair)
        assert one["global_step"] == two["global_step"]
        assert all(map(torch.equal, one["state_dict"].values(), two["state_dict"].values()))
    assert [path.name for path in (tmp_path / "background-other").glob("*.ckpt")] == ["step=00000006.ckpt"]
