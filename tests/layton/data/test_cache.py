from __future__ import annotations

import json

import pytest
import torch

from layton.data.cache import CachedTensors, CacheMismatchError
from layton.data.loader import OrderedLoader, ResumableLoader
from layton.data.mixing import MixedSource
from layton.data.sources import ScenesSource

MADE_BY = {"weights": "abc", "size": 16, "seed": 0}


def batches(length=10):
    return OrderedLoader(MixedSource([ScenesSource(length=length, size=16)], shuffle=False), batch_size=4)


def compute(batch):
    return {"latents": batch["image"].mean(dim=1).half(), "rows": torch.arange(len(batch["key"]))}


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_cache_gives_back_what_was_computed(tmp_path, in_memory):
    cache = CachedTensors.build(
        batches(), compute, str(tmp_path / "c"), fingerprint=MADE_BY, part_size=4, in_memory=in_memory
    )
    direct = [batch | compute(batch) for batch in batches()]
    assert len(cache) == 10 and cache.keys[:] == [f"scenes/{i}" for i in range(10)]
    assert torch.equal(cache.tensor("latents"), torch.cat([batch["latents"] for batch in direct]))
    for index in (0, 4, 9):
        sample, batch = cache[index], direct[index // 4]
        assert torch.equal(sample["latents"], batch["latents"][index % 4])
        assert sample["latents"].dtype == torch.float16
        assert (sample["key"], sample["caption"]) == (batch["key"][index % 4], batch["caption"][index % 4])
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [
        "cache.json", *(f"part-{i:05d}.safetensors" for i in range(3))
    ]  # fmt: skip


def test_a_cache_is_a_source_for_training(tmp_path):
    cache = CachedTensors.build(batches(), compute, str(tmp_path), fingerprint=MADE_BY)
    batch = next(iter(ResumableLoader(MixedSource([cache]), batch_size=4)))
    assert batch["latents"].shape == (4, 16, 16) and len(batch["caption"]) == 4


def test_another_maker_is_refused_and_every_difference_named(tmp_path):
    CachedTensors.build(batches(), compute, str(tmp_path), fingerprint=MADE_BY)
    CachedTensors(str(tmp_path), fingerprint=dict(reversed(MADE_BY.items())))
    for wrong in ({**MADE_BY, "size": 32}, {"weights": "abc", "seed": 0}, {**MADE_BY, "new": True}):
        with pytest.raises(CacheMismatchError, match=r"size|new"):
            CachedTensors(str(tmp_path), fingerprint=wrong)
        with pytest.raises(CacheMismatchError):
            CachedTensors.open_or_build(lambda _: batches(), compute, str(tmp_path), fingerprint=wrong)


def test_open_or_build_builds_once(tmp_path):
    made = [
        CachedTensors.open_or_build(lambda _, n=n: batches(n), compute, str(tmp_path), fingerprint=MADE_BY)
        for n in (6, 10)
    ]
    assert [len(cache) for cache in made] == [6, 6]
    with pytest.raises(ValueError, match="finished cache already"):
        CachedTensors.build(batches(), compute, str(tmp_path), fingerprint=MADE_BY)


def test_an_interrupted_build_is_no_cache_and_can_be_done_again(tmp_path):
    def interrupted():
        for number, batch in enumerate(batches()):
            if number == 2:
                raise KeyboardInterrupt
            yield batch

    with pytest.raises(KeyboardInterrupt):
        CachedTensors.build(interrupted(), compute, str(tmp_path), fingerprint=MADE_BY, part_size=4)
    with pytest.raises(ValueError, match="no finished cache"):
        CachedTensors(str(tmp_path))
    (tmp_path / ".part-00001.1234abcd.part").touch()  # killed while it wrote
    assert len(CachedTensors.build(batches(), compute, str(tmp_path), fingerprint=MADE_BY)) == 10
    assert not list(tmp_path.glob(".*"))


def test_an_interrupted_build_goes_on_after_its_last_whole_part(tmp_path):
    source, computed, started = ScenesSource(length=10, size=16), [], []

    def from_sample(start):
        started.append(start)
        return ({"image": source[i]["image"][None], "key": [source[i]["key"]]} for i in range(start, len(source)))

    def until(stop):
        def compute_some(batch):
            computed.append(batch["key"][0])
            if len(computed) == stop:
                raise KeyboardInterrupt
            return compute(batch)

        return compute_some

    def build(compute_, maker=MADE_BY, folder="c"):
        return CachedTensors.open_or_build(
            from_sample, compute_, str(tmp_path / folder), fingerprint=maker, part_size=4
        )

    with pytest.raises(KeyboardInterrupt):
        build(until(7))
    whole, again = build(until(100), folder="whole"), build(until(100))
    assert started == [0, 0, 4] and computed[-6:] == [f"scenes/{i}" for i in range(4, 10)]
    assert again.keys[:] == whole.keys[:] and torch.equal(again.tensor("latents"), whole.tensor("latents"))
    assert not (tmp_path / "c" / "begun.json").exists()
    (tmp_path / "c" / "cache.json").unlink()  # parts of which nobody says who made them are made anew
    build(until(100))
    assert started[-1] == 0
    computed.clear()
    with pytest.raises(KeyboardInterrupt):
        build(until(7), folder="d")
    other = {**MADE_BY, "size": 17}  # what another maker left is no beginning of this one, also not the second time
    computed.clear()
    with pytest.raises(KeyboardInterrupt):
        build(until(2), other, folder="d")
    assert not list((tmp_path / "d").glob("part-*"))
    build(until(100), other, folder="d")
    assert started[-3:] == [0, 0, 0]


def test_what_was_passed_over_before_an_interruption_is_in_the_account(tmp_path):
    def from_sample(start):
        for batch in range(start // 2, 4):
            yield {"key": [f"{batch}a", f"{batch}b"], "bad": [f"{batch}: broken"]}
            if not start and batch == 2:
                raise KeyboardInterrupt

    def build():
        return CachedTensors.open_or_build(
            from_sample, lambda batch: {"rows": torch.zeros(2)}, str(tmp_path), fingerprint=MADE_BY, part_size=4
        )

    with pytest.raises(KeyboardInterrupt):
        build()
    assert len(build()) == 8
    assert json.loads((tmp_path / "cache.json").read_text())["broken"] == [f"{batch}: broken" for batch in range(4)]


@pytest.mark.parametrize("in_memory", [True, False])
def test_damage_is_noticed(tmp_path, in_memory):
    CachedTensors.build(batches(), compute, str(tmp_path), fingerprint=MADE_BY, part_size=4)
    part = tmp_path / "part-00001.safetensors"
    good = part.read_bytes()
    (tmp_path / "copy").write_bytes((tmp_path / "part-00002.safetensors").read_bytes())
    for damage in (good[:-40], b"", good[:9]):
        part.write_bytes(damage)
        with pytest.raises(ValueError, match="damaged cache"):
            CachedTensors(str(tmp_path), in_memory=in_memory)
    part.write_bytes((tmp_path / "copy").read_bytes())  # a part of another length
    with pytest.raises(ValueError, match="damaged cache"):
        CachedTensors(str(tmp_path), in_memory=in_memory)
    manifest = json.loads((tmp_path / "cache.json").read_text())
    manifest["parts"][0]["file"] = "../part-00000.safetensors"
    (tmp_path / "cache.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="outside the folder"):
        CachedTensors(str(tmp_path))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda batch: {"a": torch.zeros(1)}, "shape"),
        (lambda batch: {"a": torch.full((len(batch["key"]),), float("nan"))}, "not finite.*scenes/0"),
        (lambda batch: {"key": torch.zeros(len(batch["key"]))}, "clash"),
        (lambda batch: {}, "clash"),
    ],
)
def test_wrong_tensors_are_refused(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        CachedTensors.build(batches(), wrong, str(tmp_path), fingerprint=MADE_BY)
    with pytest.raises(ValueError, match="no batch"):
        CachedTensors.build([], compute, str(tmp_path), fingerprint=MADE_BY)
