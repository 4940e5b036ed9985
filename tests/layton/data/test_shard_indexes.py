from __future__ import annotations

import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from layton.data import shard_indexes
from layton.data.shard_indexes import cache_folder, index_shards
from layton.data.tar import ShardError


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Indexes are kept whatever the size of a shard, in a folder of the test; counts the passes over shards."""
    monkeypatch.setenv("LAYTON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shard_indexes, "_KEPT_FROM", 1)
    passes: list[Path] = []
    read = shard_indexes.index_shard
    monkeypatch.setattr(
        shard_indexes, "index_shard", lambda path, **options: (passes.append(path), read(path, **options))[1]
    )
    return passes


def same(one, other) -> bool:
    return (one.path, one.stamp, list(one.keys), one.missing, one.ignored) == (
        other.path,
        other.stamp,
        list(other.keys),
        other.missing,
        other.ignored,
    ) and (one.spans == other.spans).all()


def test_an_index_is_read_once_and_then_kept(kit, tmp_path, kept):
    members = [member for key in ("1", "2", "ünïcode") for member in kit.sample_members(key, 0)]
    shard = kit.write_tar(tmp_path / "a.tar", [*members, ("alone.txt", b"no image"), ("what.bin", b"?")])
    (made,), (found,) = index_shards([shard]), index_shards([shard])
    assert kept == [shard] and same(made, found) and found.keys[2] == "ünïcode"


def test_a_changed_shard_is_read_again(kit, tmp_path, kept):
    shard = kit.shard(tmp_path / "a.tar", ["000001", "000002"])
    index_shards([shard])
    kit.shard(shard, ["000001", "000003"])
    os.utime(shard, ns=(1, 1))
    assert list(index_shards([shard])[0].keys) == ["000001", "000003"] and len(kept) == 2


@pytest.mark.parametrize("damage", [b"", b"not an index", None])
def test_a_damaged_index_is_made_anew(kit, tmp_path, kept, damage):
    shard = kit.shard(tmp_path / "a.tar", ["000001", "000002"])
    index_shards([shard])
    (file,) = cache_folder().iterdir()
    file.write_bytes(file.read_bytes()[:-40] if damage is None else damage)
    assert list(index_shards([shard])[0].keys) == ["000001", "000002"] and len(kept) == 2
    index_shards([shard])
    assert len(kept) == 2  # and is whole again


def test_captions_that_were_optional_are_missed_when_required(kit, tmp_path, kept):
    shard = kit.write_tar(tmp_path / "a.tar", [kit.sample_members(key)[0] for key in ("000001", "000002")])
    assert len(index_shards([shard], captions="optional")[0].keys) == 2
    with pytest.raises(ShardError, match="half a sample"):
        index_shards([shard])


def test_nothing_is_kept_where_nothing_can_be_written(kit, tmp_path, kept, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LAYTON_CACHE", str(tmp_path / "file"))
    shard = kit.shard(tmp_path / "a.tar", ["000001"])
    assert len(index_shards([shard])[0].keys) == len(index_shards([shard])[0].keys) == 1 and len(kept) == 2


def test_where_indexes_cannot_be_written_none_are_kept(kit, tmp_path, kept, monkeypatch):
    def refuse(*args):
        raise SafetensorError("I/O error: Permission denied (os error 13)")

    monkeypatch.setattr(shard_indexes, "save_file", refuse)
    shard = kit.shard(tmp_path / "a.tar", ["000001", "000002"])
    assert list(index_shards([shard])[0].keys) == ["000001", "000002"]
    assert not list(cache_folder().glob("*"))
