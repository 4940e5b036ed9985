"""One writer for one folder: a second one is refused, and told who the first is."""

from __future__ import annotations

import errno
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has none: folders are not locked there
    fcntl = None  # type: ignore[assignment]

LOCK_NAME = ".lock"
_held: set[Path] = set()


class FolderInUseError(ValueError):
    """Another process writes to the folder."""


@contextmanager
def lock_folder(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold ``folder`` for this process while the context lasts.

    The system's record lock ends with the process, however that dies, so nothing is left to clean up; unlike a lock of
    the open file it does not pass to forked workers, which may outlive a killed parent.

    Args:
        folder: Made if it does not exist. The file ``.lock`` in it says who holds it, and stays.
        wait: For another process to be done with it, instead of refusing. On file systems without locks nobody is kept
            out, which is said.

    Raises:
        FolderInUseError: Another process, or another part of this one, holds it; names host and pid.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = (folder / LOCK_NAME).resolve()
    if path in _held:  # record locks never refuse their own process
        raise FolderInUseError(f"{folder} is in use by this process ({_me()})")
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if fcntl is not None:
            try:
                fcntl.lockf(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    warnings.warn(
                        f"{folder} cannot be locked ({error}): see that nobody else writes to it", stacklevel=3
                    )
                    yield
                    return
                owner = os.read(handle, 200).decode(errors="replace").strip() or "another process"
                raise FolderInUseError(f"{folder} is in use by {owner}") from None
        os.ftruncate(handle, 0)
        os.write(handle, f"{_me()}\n".encode())
        _held.add(path)
        try:
            yield
        finally:
            _held.discard(path)
    finally:
        os.close(handle)


def is_main_process() -> bool:
    """Whether this is rank 0, judged before any process group exists, from what launchers set."""
    return all(
        os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
    )


def _me() -> str:
    return f"pid {os.getpid()} on {socket.gethostname()}"
