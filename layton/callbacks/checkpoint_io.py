"""Checkpoint files that survive kill -9, a full disk and flipped bits.

A checkpoint is written to a hidden file beside its target, synced, renamed over the target, and the folder is synced:
at every moment the target is absent, the previous file or the new one. (Lightning's own writer stages in TMPDIR,
which may be another filesystem, and does not sync.) The SHA-256 of the file stands beside it in ``NAME.ckpt.json``.
That note is written before the rename and adds the new file's digest to those it names; after the rename it names the
new one alone. So it is right whenever the process dies, also several times in a row.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from io import RawIOBase
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from distill.budget import tensors_in
from layton.folder import share

_NOTE_SUFFIX = ".json"
_TEMPORARY_PREFIX = ".writing-"
KILL_POINT_VARIABLE = "LAYTON_KILL_POINT"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or must not be read."""


def kill_point(name: str) -> None:
    """Die here when the environment asks for it: lets tests stop a real writer at every stage of its work."""
    if os.environ.get(KILL_POINT_VARIABLE) == name:
        os.kill(os.getpid(), 9)


class SafeCheckpointIO(CheckpointIO):
    """Lightning plugin that writes and reads checkpoint files as described above; `SafeCheckpoint` installs it."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: nested plain containers, numbers, strings and tensors.
            path: target file on a local filesystem.
            storage_options: must be None.

        Raises:
            CheckpointError: the disk is full or cannot be written; the previous file is untouched.
            TypeError: storage_options given.
        """
        if storage_options is not None:
            raise TypeError(f"SafeCheckpointIO takes no storage_options, got {storage_options!r}")
        target = Path(path)
        temporary = target.parent / f"{_TEMPORARY_PREFIX}{socket.gethostname()}-{os.getpid()}-{target.name}"
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            digest, size = _write_synced(checkpoint, temporary)
            kill_point("checkpoint:after_write")
            note = {"sha256": [digest], "bytes": size, "global_step": int(checkpoint.get("global_step", 0))}
            # All digests that stand there: after a kill just here the file is not the one that the first one names.
            _write_note(target, {**note, "sha256": [digest, *_digests(target)]})
            kill_point("checkpoint:before_rename")
            os.replace(temporary, target)
            kill_point("checkpoint:after_rename")
            _sync_folder(target.parent)
            _write_note(target, note)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise CheckpointError(
                f"cannot write checkpoint {target} ({_tensor_bytes(checkpoint) / 1e6:.1f} MB needed): {error}"
            ) from error

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Callable[[Any, Any], Any] | None = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint after checking its digest; always with ``weights_only=True``, never unpickling objects.

        Args:
            path: a local file.
            map_location: as in torch.load.
            weights_only: ignored, the answer is always True.

        Raises:
            CheckpointError: the file is missing, differs from its digest, or holds anything but plain data.
        """
        source = Path(path)
        problem = checkpoint_problem(source)
        if problem is not None:
            raise CheckpointError(problem)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Detected pickle protocol")  # what follows is the error below
                # mapped: ranks of one machine share its memory
                loaded = torch.load(source, map_location=map_location, weights_only=True, mmap=True)
        except Exception as error:  # a foreign file fails in many ways, all meaning the same
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CheckpointError(
                f"{source} is not a checkpoint of plain tensors and numbers ({reason}). Objects are never unpickled; "
                "released weights are brought in by `layton convert`."
            ) from error
        if not isinstance(loaded, dict):
            raise CheckpointError(f"{source} holds a {type(loaded).__name__}, not a checkpoint")
        return loaded

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Remove a checkpoint and its digest."""
        target = Path(path)
        target.unlink(missing_ok=True)
        _note_path(target).unlink(missing_ok=True)


class BackgroundCheckpointIO(SafeCheckpointIO):
    """Writes the same files in a thread: training waits only while the state is copied to the processor's memory.

    One file is written at a time, and an old one is removed only after the new one is whole, so that a kill costs no
    more than it would otherwise. An error of one save is raised at the next, or at the end. (Lightning's
    ``AsyncCheckpointIO`` copies on the device, lets saves queue up, and removes old files at once.)
    """

    def __init__(self) -> None:
        super().__init__()
        self._pool: ThreadPoolExecutor | None = None
        self._under_way: Future[None] | None = None
        self._removals: list[Future[None]] = []

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Copy a checkpoint, and have it written; see `SafeCheckpointIO.save_checkpoint`.

        Raises:
            CheckpointError: An earlier one could not be written.
        """
        self._finish()
        copied = apply_to_collection(checkpoint, Tensor, _copied)
        self._pool = self._pool or ThreadPoolExecutor(1)
        self._under_way = self._pool.submit(super().save_checkpoint, copied, path, storage_options)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Remove a checkpoint once what is being written is there; keep it if that fails."""
        under_way, remove = self._under_way, super().remove_checkpoint

        def after() -> None:
            if under_way is None or under_way.exception() is None:
                remove(path)

        if self._pool is None:
            remove(path)
        else:
            self._removals.append(self._pool.submit(after))

    def teardown(self) -> None:
        """Wait for the last file.

        Raises:
            CheckpointError: It could not be written.
        """
        try:
            self._finish()
        finally:
            if self._pool is not None:
                self._pool.shutdown()
                self._pool = None

    def _finish(self) -> None:
        under_way, self._under_way = self._under_way, None
        removals, self._removals = self._removals, []
        if under_way is not None:
            under_way.result()
        for removal in removals:
            removal.result()


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def checkpoint_problem(path: Path) -> str | None:
    """What is wrong with a checkpoint file, in one line; None when it equals its digest.

    A file without digest (written by another program) passes with a warning.
    """
    if not path.is_file():
        return f"no checkpoint at {path}"
    if not _note_path(path).is_file():
        warnings.warn(f"{path} has no digest beside it and is read unchecked", stacklevel=2)
        return None
    expected = _digests(path)
    if not expected:
        return f"the digest file {_note_path(path)} cannot be read"
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found not in expected:
        return f"{path} is damaged: SHA-256 is {found[:16]}..., expected {expected[0][:16]}..."
    return None


def newest_good_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of a folder with the highest global step that equals its digest; None when there is none.

    Damaged ones are passed over with a warning. Files without digest do not count.
    """
    candidates = [path for path in folder.glob("*.ckpt") if _note_path(path).is_file()]
    for path in sorted(candidates, key=_age, reverse=True):
        problem = checkpoint_problem(path)
        if problem is None:
            return path
        warnings.warn(f"{problem}; trying the one before", stacklevel=2)
    return None


def leave_behind(folder: Path, chosen: Path) -> list[Path]:
    """Put aside the checkpoints of a folder that are of later steps than the one of it that a run goes on from.

    They are of a branch that somebody gave up; the newest good checkpoint shall be one of the new branch.

    Returns:
        Their new names, which end in ``.left``.
    """
    if chosen.resolve().parent != folder.resolve() or not _note_path(chosen).is_file():
        return []
    step, moved = _age(chosen)[0], []
    for path in sorted(folder.glob("*.ckpt")):
        if _age(path)[0] > step:
            for part in (path, _note_path(path)):
                if part.exists():
                    part.rename(part.with_name(f"{part.name}.left"))
            moved.append(path.with_name(f"{path.name}.left"))
    return moved


def sweep_orphans(folder: Path) -> list[Path]:
    """Remove what killed writers left behind, on other machines, too: who calls holds the folder's lock.

    Returns:
        The files removed.
    """
    removed, own = [], f"{_TEMPORARY_PREFIX}{socket.gethostname()}-"
    for path in sorted(folder.glob(f"{_TEMPORARY_PREFIX}*")):
        pid = path.name.removeprefix(own).split("-", 1)[0]
        if not (path.name.startswith(own) and pid.isdigit() and _alive(int(pid))):
            path.unlink(missing_ok=True)
            removed.append(path)
    for note in sorted(folder.glob(f"*.ckpt{_NOTE_SUFFIX}")):
        if not note.with_name(note.name.removesuffix(_NOTE_SUFFIX)).exists():
            note.unlink(missing_ok=True)
            removed.append(note)
    return removed


class _HashingFile:
    """Write-only file that digests what passes; after a failed write it swallows the rest and keeps the error.

    torch's zip writer ends the process when a write raises while it is being closed, hence the swallowing.
    """

    def __init__(self, file: RawIOBase) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.size = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if self.error is None:
            try:
                rest = view
                while rest:  # a raw file takes 2 GB at most at once, and what there is room for
                    rest = rest[self._file.write(rest) :]
            except OSError as error:
                self.error = error
        self._hash.update(view)
        self.size += len(view)
        return len(view)

    def flush(self) -> None:
        if self.error is None:
            try:
                self._file.flush()
            except OSError as error:
                self.error = error

    def digest(self) -> str:
        return self._hash.hexdigest()


def _write_synced(checkpoint: dict[str, Any], path: Path) -> tuple[str, int]:
    with path.open("wb", buffering=0) as raw:
        file = _HashingFile(raw)
        torch.save(checkpoint, file)  # type: ignore[arg-type]
        file.flush()
        if file.error is not None:
            raise file.error
        kill_point("checkpoint:before_sync")
        os.fsync(raw.fileno())
    return file.digest(), file.size


def _note_path(path: Path) -> Path:
    return path.with_name(path.name + _NOTE_SUFFIX)


def _write_note(path: Path, note: dict[str, Any]) -> None:
    handle, temporary = tempfile.mkstemp(
        dir=path.parent, prefix=f"{_TEMPORARY_PREFIX}{socket.gethostname()}-{os.getpid()}-"
    )
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(note, file)
            file.flush()
            os.fsync(file.fileno())
        share(Path(temporary))
        os.replace(temporary, _note_path(path))
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _read_note(path: Path) -> dict[str, Any]:
    try:
        note = json.loads(_note_path(path).read_text())
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def _digests(path: Path) -> list[str]:
    digests = _read_note(path).get("sha256", [])
    return [str(digest) for digest in digests] if isinstance(digests, list) else []


def _age(path: Path) -> tuple[int, float]:
    step = _read_note(path).get("global_step", 0)
    with contextlib.suppress(OSError):
        return (step if isinstance(step, int) else 0, path.stat().st_mtime)
    return (0, 0.0)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _tensor_bytes(value: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors_in(value))
