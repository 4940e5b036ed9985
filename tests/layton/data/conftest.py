"""Tiny images and shards, made on the fly."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def smooth_image(seed=0, size=(48, 40)):
    """A smooth colourful RGB image (width, height) that JPEG keeps well."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC)


def encode(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_tar(path: Path, members):
    """Members: (name, bytes) or TarInfo."""
    with tarfile.open(path, "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))
    return path


def sample_members(key, seed=None, *, caption="a thing"):
    number = int(key) if seed is None else seed
    return [
        (f"{key}.jpg", encode(smooth_image(number))),
        (f"{key}.txt", f"{caption} {key}".encode()),
        (f"{key}.json", json.dumps({"number": number}).encode()),
    ]


class Kit:
    smooth_image = staticmethod(smooth_image)
    encode = staticmethod(encode)
    write_tar = staticmethod(write_tar)
    sample_members = staticmethod(sample_members)

    @staticmethod
    def shard(path, keys):
        return write_tar(path, [member for key in keys for member in sample_members(key)])


@pytest.fixture
def kit():
    return Kit


@pytest.fixture
def shards(tmp_path):
    """Two shards of ten samples each: keys 000000 to 000009 and 010000 to 010009."""
    for number in (0, 1):
        Kit.shard(tmp_path / f"toy-{number:04d}.tar", [f"{number * 10000 + i:06d}" for i in range(10)])
    return str(tmp_path / "toy-*.tar")
