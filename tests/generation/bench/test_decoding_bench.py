from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from generation.bench import contenders
from generation.bench import decoding as bench
from generation.bench.contenders import BenchShape
from generation.bench.decoding import BenchOptions, run_bench
from generation.commands import bench as command
from layton.bench import distillation
from layton.bench.distillation import DistillationReport
from layton.bench.report import make_bar

TINY = BenchShape("tiny", "tiny", 1.4, caption_length=3, caption_dim=8, vocab_size=64, num_tokens=16)


def test_every_bar_is_measured_and_decoding_is_checked_in_the_same_run() -> None:
    report = run_bench([TINY], BenchOptions(rounds=2, num_codes=12, peer=False, batch=3, compiled=False))
    assert [bar.name for bar in report.bars] == [f"{bar} tiny" for bar in ("P2", "P4", "P5", "P6", "P7")]
    assert all(bar.ratio > 0 and bar.ratio_of_fastest > 0 for bar in report.bars)
    assert report.cached_equals_uncached == {"tiny": True}
    assert report.cache_bytes == {"tiny": 2 * 2 * 2 * 32 * (3 + 15) * 4}
    json.dumps(report.as_json(), allow_nan=False)


def test_the_floor_is_every_linear_layer_of_a_step() -> None:
    model = contenders.build(TINY)
    assert len(contenders.linear_layers(model)) == 4 * len(model.blocks) + 2


def test_the_command_prints_and_writes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "SHAPES", (TINY,))
    monkeypatch.setattr(
        bench, "BenchOptions", lambda **_: BenchOptions(rounds=1, num_codes=6, peer=False, batch=2, compiled=False)
    )
    threads = torch.get_num_threads()
    bar = make_bar("P15 scott", "", [1.0], [1.0], 1.1, at_least=False)
    steps = DistillationReport((bar,), {}, {}, {}, {}, 0.0, {"clock": "thread CPU time"})
    monkeypatch.setattr(distillation, "run_distillation_bench", lambda *_: steps)
    command.bench(json=tmp_path / "bench.json", quick=True)
    assert torch.get_num_threads() == threads
    told = capsys.readouterr().out
    assert "P7 tiny" in told and "P15 scott" in told
    figures = json.loads((tmp_path / "bench.json").read_text())
    assert [report["protocol"]["clock"] for report in figures.values()] == ["thread CPU time"] * 2


def test_a_part_is_measured_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench, "SHAPES", (TINY,))
    monkeypatch.setattr(
        bench, "BenchOptions", lambda **_: BenchOptions(rounds=1, num_codes=6, peer=False, batch=2, compiled=False)
    )
    command.bench(what="decoding", quick=True)
    assert "P15" not in capsys.readouterr().out


@pytest.mark.slow
def test_transformers_and_compiled_steps_are_measured_beside() -> None:
    report = run_bench([TINY], BenchOptions(rounds=1, num_codes=6, batch=2))
    assert {"P2c tiny", "P3 tiny", "P3c tiny"} <= {bar.name for bar in report.bars}
    assert report.cached_equals_uncached == {"tiny": True, "tiny compiled": True}
