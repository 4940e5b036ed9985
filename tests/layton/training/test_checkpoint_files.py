"""Checkpoint files survive being killed at any moment, a full disk, flipped bits and hostile contents."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import random
import resource
import signal
import time
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from layton.callbacks.checkpoint_io import (
    KILL_POINT_VARIABLE,
    CheckpointError,
    SafeCheckpointIO,
    _HashingFile,
    newest_good_checkpoint,
    sweep_orphans,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")  # the writer is a plain copy

KILL_POINTS = ("before_sync", "after_write", "before_rename", "after_rename")


def state(step: int, size: int = 1000) -> dict[str, Any]:
    return {"global_step": step, "state_dict": {"w": torch.full((size,), float(step))}}


@dataclass(frozen=True)
class Writer:
    """A forked process that saves one checkpoint after the other and tells the step of each that is done."""

    pid: int
    pipe: int

    @classmethod
    def start(cls, folder: Path, first: int, *, same: bool, environment: dict[str, str] | None = None) -> Writer:
        readable, writable = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.environ.update(environment or {})
            write_forever(folder, first, same=same, pipe=writable)
        os.close(writable)
        assert os.read(readable, 1) == b"r"
        return cls(pid, readable)

    def wait(self) -> list[int]:
        """Steps told before it was killed."""
        _, status = os.waitpid(self.pid, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        told = b""
        while part := os.read(self.pipe, 65536):
            told += part
        os.close(self.pipe)
        return [int(line) for line in told.split()]


def write_forever(folder: Path, first: int, *, same: bool, pipe: int) -> NoReturn:
    try:
        sweep_orphans(folder)
        os.write(pipe, b"r")
        for step in count(first):
            name = "last.ckpt" if same else f"step={step:08d}.ckpt"
            SafeCheckpointIO().save_checkpoint(state(step, 250_000), folder / name)
            os.write(pipe, f"{step} ".encode())
            if not same and step > first + 1:
                SafeCheckpointIO().remove_checkpoint(folder / f"step={step - 2:08d}.ckpt")
    finally:
        os._exit(1)


def check_newest(folder: Path, told: list[int], *, at_least: int) -> int:
    """The newest good file is the last one that the writer told of, or the one it was about to tell of."""
    newest = newest_good_checkpoint(folder)
    assert newest is not None
    loaded = SafeCheckpointIO().load_checkpoint(newest)
    last = max([*told, at_least])
    assert loaded["global_step"] in (last, last + 1)
    assert bool((loaded["state_dict"]["w"] == loaded["global_step"]).all())
    orphans = [path for path in folder.iterdir() if path.name.startswith(".writing-")]
    assert len(orphans) <= 2  # one checkpoint and one note
    return int(loaded["global_step"])


@pytest.mark.parametrize("point", KILL_POINTS)
def test_kill_at_every_stage_of_overwriting_a_file(tmp_path: Path, point: str) -> None:
    SafeCheckpointIO().save_checkpoint(state(0), tmp_path / "last.ckpt")
    writer = Writer.start(tmp_path, 1, same=True, environment={KILL_POINT_VARIABLE: f"checkpoint:{point}"})
    assert writer.wait() == []
    assert check_newest(tmp_path, [], at_least=0) == (1 if point == "after_rename" else 0)
    sweep_orphans(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "last.ckpt.json"]


def test_two_kills_in_a_row_before_the_rename(tmp_path: Path) -> None:
    """The second note once forgot the digest of the file that was still there."""
    SafeCheckpointIO().save_checkpoint(state(0), tmp_path / "last.ckpt")
    for first in (1, 10):
        point = {KILL_POINT_VARIABLE: "checkpoint:before_rename"}
        assert Writer.start(tmp_path, first, same=True, environment=point).wait() == []
        assert check_newest(tmp_path, [], at_least=0) == 0


def kill_often(folder: Path, times: int, *, same: bool, elsewhere: Path | None) -> None:
    dice, done = random.Random(0), 0
    SafeCheckpointIO().save_checkpoint(state(0), folder / ("last.ckpt" if same else "step=00000000.ckpt"))
    environment = {"TMPDIR": str(elsewhere)} if elsewhere is not None else {}
    for _ in range(times):
        writer = Writer.start(folder, done + 1, same=same, environment=environment)
        time.sleep(dice.uniform(0.0, 0.25))
        os.kill(writer.pid, signal.SIGKILL)
        done = check_newest(folder, writer.wait(), at_least=done)
    assert done > 0


def test_random_kills(tmp_path: Path) -> None:
    kill_often(tmp_path, 8, same=True, elsewhere=None)


@pytest.mark.slow
@pytest.mark.parametrize("same", [True, False])
def test_fifty_random_kills(tmp_path: Path, same: bool) -> None:
    kill_often(tmp_path, 50, same=same, elsewhere=None)


@pytest.mark.slow
def test_kills_with_temporary_files_on_another_filesystem(tmp_path: Path) -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir():
        pytest.skip("no second filesystem")
    kill_often(tmp_path, 25, same=True, elsewhere=memory)


def test_full_disk_leaves_the_previous_file_and_says_what_was_needed(tmp_path: Path) -> None:
    target = tmp_path / "last.ckpt"
    SafeCheckpointIO().save_checkpoint(state(1, 10), target)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        size = (tmp_path / "last.ckpt").stat().st_size
        for limit in (0, 1, 100, 1000, 4096, 10_000, 65_536, 100_000, 300_000, 399_999, size - 1):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            try:
                with pytest.raises(CheckpointError, match=r"last\.ckpt \(0\.4 MB needed\)"):
                    SafeCheckpointIO().save_checkpoint(state(2, 100_000), target)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    finally:
        signal.signal(signal.SIGXFSZ, previous)
    assert SafeCheckpointIO().load_checkpoint(target)["global_step"] == 1


class Slow(io.BytesIO):
    """Takes a few bytes at once, as a raw file takes 2 GB."""

    def write(self, data: Any) -> int:
        return super().write(data[:1000])


def test_what_a_file_takes_in_parts_arrives_whole() -> None:
    slow = Slow()
    file = _HashingFile(slow)  # type: ignore[arg-type]
    torch.save(state(1, 10_000), file)  # type: ignore[arg-type]
    assert file.error is None and file.size == len(slow.getvalue())
    assert file.digest() == hashlib.sha256(slow.getvalue()).hexdigest()
    slow.seek(0)
    assert torch.load(slow, weights_only=True)["global_step"] == 1


def test_every_flipped_byte_and_every_cut_is_noticed(tmp_path: Path) -> None:
    io, newest = SafeCheckpointIO(), tmp_path / "step=2.ckpt"
    io.save_checkpoint(state(1, 200), tmp_path / "step=1.ckpt")
    io.save_checkpoint(state(2, 200), newest)
    whole, dice = newest.read_bytes(), random.Random(0)
    damaged = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in dice.sample(range(len(whole)), 100)]
    damaged += [whole[:size] for size in dice.sample(range(len(whole)), 20)]
    for content in damaged:
        newest.write_bytes(content)
        with pytest.raises(CheckpointError, match="damaged"):
            io.load_checkpoint(newest)
    with pytest.warns(UserWarning, match="damaged"):
        assert newest_good_checkpoint(tmp_path) == tmp_path / "step=1.ckpt"
    newest.unlink()
    assert newest_good_checkpoint(tmp_path) == tmp_path / "step=1.ckpt"
    with pytest.raises(CheckpointError, match="no checkpoint"):
        io.load_checkpoint(newest)


class Evil:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return (Path.touch, (self.canary,))


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_objects_are_never_unpickled(tmp_path: Path, form: str) -> None:
    path, canary = tmp_path / "evil.ckpt", tmp_path / "canary"
    if form == "pickle":
        path.write_bytes(pickle.dumps({"state_dict": Evil(canary)}))
    else:
        torch.save({"state_dict": Evil(canary)}, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.warns(UserWarning, match="no digest"), pytest.raises(CheckpointError, match="layton convert"):
        SafeCheckpointIO().load_checkpoint(path, weights_only=False)
    assert not canary.exists()


def test_a_living_writer_is_not_swept(tmp_path: Path) -> None:
    import socket

    mine = tmp_path / f".writing-{socket.gethostname()}-{os.getpid()}-a.ckpt"
    mine.touch()
    assert sweep_orphans(tmp_path) == [] and mine.exists()
    others = tmp_path / ".writing-another-host-1-a.ckpt"  # the lock is ours: nobody writes there any more
    others.touch()
    assert sweep_orphans(tmp_path) == [others] and not others.exists() and mine.exists()
