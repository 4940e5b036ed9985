from __future__ import annotations

import errno
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
