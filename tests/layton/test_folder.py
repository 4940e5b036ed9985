from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from layton.folder import full_disk_told, write_atomically

NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
WRITERS: dict[str, Callable[[Path], object]] = {
    "text": lambda part: part.write_text("long " * 2000),
    "tensors": partial(save_file, {"a": torch.ones(5000)}),
    "picture": partial(Image.fromarray(NOISE).save, format="PNG"),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_is_told_with_the_file_and_leaves_the_old_one(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(OSError, match="file could not be written: file too large"):
            write_atomically(target, WRITERS[kind])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert target.read_text() == "old"
    write_atomically(target, WRITERS[kind])
    assert target.stat().st_size > 4096


def test_a_full_disk_says_how_much_room_there_is(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "new" / "file"):
        told = pytest.raises(OSError, match=r"could not be written: no space left on device, [\d.]+ MB are free")
        with told, full_disk_told(place):
            raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(PermissionError), full_disk_told(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied")


def test_a_link_stays_one_and_what_is_no_file_is_written_into(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    write_atomically(link, lambda part: part.write_text("new"))
    assert link.is_symlink()
    assert target.read_text() == "new"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_atomically(pipe, lambda part: part.write_text("figures"))
        assert os.read(reader, 100) == b"figures"
    finally:
        os.close(reader)
    assert pipe.is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe", "target"]
