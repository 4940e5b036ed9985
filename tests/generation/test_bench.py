from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from generation import bench, contenders
from generation.bench import BenchOptions, run_bench
from generation.commands import bench as command
from generation.contenders import BenchShape

TINY = BenchShape("tiny", "tiny", 1.4, caption_length=3, caption_dim=8, vocab_size=64, num_tokens=16)


def test_every_bar_is_measured_and_decoding_is_checked_in_the_same_run() -> None:
    report = run_bench([TINY], BenchOptions(rounds=2, num_codes=12, peer=False, batch=3))
    assert [bar.name for bar in report.bars] == [f"{bar} tiny" for bar in ("P2", "P4", "P5", "P6", "P7")]
    assert all(bar.ratio > 0 and bar.ratio_of_fastest > 0 for bar in report.bars)
    assert report.cached_equals_uncached == {"tiny": True}
    assert report.cache_bytes == {"tiny": 2 * 2 * 2 * 32 * (3 + 15) * 4}
    json.dumps(report.as_json(), allow_nan=False)


def test_a_ratio_is_formed_within_each_round() -> None:
    bar = bench._bar("P", "", [2.0, 40.0, 6.0], [1.0, 10.0, 2.0], 2.5, at_least=True)
    assert (bar.ratio, bar.ratio_of_fastest, bar.passed) == (3.0, 2.0, True)
    assert not bench._bar("P", "", [2.0], [1.0], 1.5, at_least=False).passed


def test_the_floor_is_every_linear_layer_of_a_step() -> None:
    model = contenders.build(TINY)
    assert len(contenders.linear_layers(model)) == 4 * len(model.blocks) + 2


def test_the_command_prints_and_writes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "SHAPES", (TINY,))
    monkeypatch.setattr(bench, "BenchOptions", lambda **_: BenchOptions(rounds=1, num_codes=6, peer=False, batch=2))
    threads = torch.get_num_threads()
    command.bench(json=tmp_path / "bench.json", quick=True)
    assert torch.get_num_threads() == threads
    assert "P7 tiny" in capsys.readouterr().out
    assert json.loads((tmp_path / "bench.json").read_text())["protocol"]["clock"] == "thread CPU time"


@pytest.mark.slow
def test_transformers_is_measured_beside() -> None:
    report = run_bench([TINY], BenchOptions(rounds=1, num_codes=6, batch=2))
    assert "P3 tiny" in [bar.name for bar in report.bars]
