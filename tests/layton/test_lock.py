from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from layton.lock import FolderInUseError, lock_folder

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
