from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from layton.lock import FolderInUseError, is_main_process, lock_folder

HOLD = """
import os, sys, time
from pathlib import Path
from layton.lock import lock_folder
with lock_folder(Path(sys.argv[1])):
    if os.fork() == 0:  # a worker that outlives a killed parent must not keep the lock
        time.sleep(5)
        os._exit(0)
    print("held", flush=True)
    time.sleep(60)
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)  # noqa: S603
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_second_writer_is_refused_at_once_and_told_who_writes(tmp_path: Path) -> None:
    first = hold(tmp_path)
    try:
        start = time.monotonic()
        with pytest.raises(FolderInUseError, match=rf"pid {first.pid} on \S+"), lock_folder(tmp_path):
            pass
        assert time.monotonic() - start < 5
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        assert first.stdout is not None
        first.stdout.close()
    for _ in range(2):  # the lock of a killed process is free, and frees again
        with lock_folder(tmp_path):
            pass


def test_one_process_locks_a_folder_once(tmp_path: Path) -> None:
    with lock_folder(tmp_path):
        with pytest.raises(FolderInUseError, match="this process"), lock_folder(tmp_path):
            pass
        with pytest.raises(FolderInUseError), lock_folder(tmp_path):  # a refusal does not free it
            pass
    with lock_folder(tmp_path):
        pass


def test_a_second_writer_may_wait(tmp_path: Path) -> None:
    first = hold(tmp_path)
    threading.Timer(0.5, first.kill).start()
    with lock_folder(tmp_path, wait=True):
        assert first.wait(5) is not None
    assert first.stdout is not None
    first.stdout.close()


def test_where_nothing_can_be_locked_nobody_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lockf(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("layton.lock.fcntl.lockf", lockf)
    with pytest.warns(UserWarning, match="cannot be locked.*No locks available"), lock_folder(tmp_path):
        pass


def test_the_main_process_is_the_first_of_the_first_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_main_process()
    monkeypatch.setenv("NODE_RANK", "1")
    assert not is_main_process()
