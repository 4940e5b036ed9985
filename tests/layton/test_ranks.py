from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from laytongen_parts import tiny_tokenizer
from rank_tools import ITEMS, check_rank

from layton.cli import main
from layton.errors import UsageError
from layton.ranks import all_gather_items, all_gather_shares, joined_ranks, own_rank, own_share, said_by_first


def test_one_process_has_everything() -> None:
    assert own_share(ITEMS) == ITEMS
    assert all_gather_items(ITEMS) == ITEMS
    assert all_gather_shares(torch.eye(3)).equal(torch.eye(3))
    assert (own_rank(), said_by_first(5)) == (0, 5)


def test_two_processes_share_and_gather(unused_port: int) -> None:
    torch.multiprocessing.spawn(check_rank, args=(str(unused_port),), nprocs=2)


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_other_commands_refuse_to_be_done_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main(["tokenize", "scenes", "--out", str(tmp_path / "tokens")]) == 2
    assert "layton tokenize runs in one process, and torchrun began 2" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    monkeypatch.delenv("LOCAL_RANK")  # a cluster says so much to all of its processes
    assert main(["info", "--json", str(tmp_path / "info.json")]) == 0


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UsageError, match="process 1 has no GPU of its own: there are 1"), joined_ranks():
        pass


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["reconstruction", "--data", "scenes", "--count", "5", "--size", "32", "--objects", "3", "--batch-size", "2"],
        ["codebook", "--data", "scenes", "--count", "5"],
    ],
)
def test_torchrun_gives_the_figures_of_one_process(words: list[str], tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    command = ["evaluate", *words, "--tokenizer", str(tmp_path / "tokenizer"), "--json"]
    assert main([*command, str(tmp_path / "one.json")]) == 0
    several = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "layton"]
    done = subprocess.run(  # noqa: S603  # our own command
        [*several, *command, str(tmp_path / "two.json")], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    _check_alike(two, one)
    assert done.stdout.count("codebook") == 1  # one process tells it


def _check_alike(two: object, one: object) -> None:
    if isinstance(one, dict) and isinstance(two, dict):
        assert list(two) == list(one)
        for name in one:
            _check_alike(two[name], one[name])
    else:
        assert two == (pytest.approx(one, rel=1e-3, abs=1e-5) if isinstance(one, float) else one)
