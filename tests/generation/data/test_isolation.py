from __future__ import annotations

from pathlib import Path

import pytest
from laytongen_parts import tiny_tokenizer
from poisoned import CRASHES, FAILS, poisoned_job

from generation.data import isolation
from generation.data.isolation import IsolatedRunner
from generation.data.token_shards import read_shard, shard_files, verify
from generation.data.tokenizing import TokenizeJob, tokenize_dataset
from layton.data.sources import ScenesSource


def test_images_that_end_the_process_are_passed_over_and_the_rest_is_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POISON", "some")
    report = tokenize_dataset(poisoned_job(), tmp_path / "tokens", elsewhere=IsolatedRunner(poisoned_job))
    assert (report.inputs, report.samples) == (12, 10)
    assert report.skipped == (
        f"input {CRASHES}: the process that encodes it ended (SIGSEGV)",
        f"input {FAILS}: RuntimeError: a bug of a decoder",
    )
    assert verify(tmp_path / "tokens") == []
    tokenizer = tiny_tokenizer()  # what is there is what a run without those two images would give
    source = ScenesSource(split="train", length=12, size=tokenizer.image_size)
    tokenize_dataset(TokenizeJob(source, tokenizer, "scenes", shard_size=10, batch_size=3), tmp_path / "sound")
    found, whole = (
        {key: codes.tolist() for path in shard_files(tmp_path / name) for key, codes in _samples(path)}
        for name in ("tokens", "sound")
    )
    missing = {source.sample(index, seed=0)["key"] for index in (CRASHES, FAILS)}
    assert found == {key: codes for key, codes in whole.items() if key not in missing}


@pytest.mark.parametrize(
    ("poison", "told"),
    [
        ("encoder", "shard 1: a blank image fails, too: RuntimeError: a bug of the encoder"),
        ("disk", "shard 1: PermissionError: the disk is gone"),
    ],
)
def test_what_is_no_images_fault_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poison: str, told: str
) -> None:
    monkeypatch.setenv("POISON", poison)
    monkeypatch.setattr(isolation, "ALONE", 1)  # each trial begins a process
    with pytest.raises(ValueError, match=told):
        list(IsolatedRunner(poisoned_job)(tmp_path, range(1, 2)))
    assert not list(tmp_path.iterdir())


def _samples(path: Path) -> list[tuple[str, object]]:
    shard = read_shard(path)[1]
    return list(zip(shard.keys, shard.codes.long(), strict=True))
