from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch

from layton.bench import distillation
from layton.bench.distillation import (
    PEERS,
    DistillationOptions,
    compare,
    counted_times,
    method_step,
    run_distillation_bench,
)
from layton.bench.distillation_steps import DistillationShape
from layton.bench.memory import peak_bytes
from layton.bench.report import Bar, bar_line, make_bar

TINY = DistillationShape(
    widths=(8, 8), channels=4, size=4, batch=8, text_length=3, text_width=8, norm_num_groups=4, rank=2
)


def test_the_peer_computes_the_same_step() -> None:
    losses, difference = compare(TINY)
    assert losses["lcm"] == pytest.approx(losses[PEERS[0]], abs=1e-5)
    assert losses["lcm"] > 1e-3 and difference < 1e-3


def test_a_speed_of_different_results_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "compare", lambda _: ({"lcm": 0.1, PEERS[0]: 0.1001}, 0.0))
    with pytest.raises(RuntimeError, match="differ"):
        run_distillation_bench(TINY)


def test_the_report_holds_every_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "peak_bytes", lambda _, name: 60 if name == "lcm" else 100)
    report = run_distillation_bench(TINY, DistillationOptions(rounds=1))
    assert [bar.name for bar in report.bars] == ["P15 lcm", "P15 lcm", "P15 mlcm", "P15 mlcm stage 2", "P15 scott"]
    assert report.bars[1] == Bar(
        "P15 lcm", "step / diffusers' arithmetic, peak memory", 0.6, 0.6, goal=0.75, at_least=False, passed=True
    )
    assert all(bar.ratio > 0 for bar in report.bars)
    assert report.forward_equivalents["mlcm stage 2"] == (4 + 2 * 3 + 3) * 8 + 7  # a target is at the clean end already
    assert report.forward_equivalents["scott"] == (2 * 3 + 1 + 3 + 3 + 6) * 8
    assert {"forward 16", *PEERS} < report.milliseconds.keys()
    json.dumps(report.as_json(), allow_nan=False)
    assert report.protocol["shape"] == asdict(TINY)


def test_steps_learn_and_cost_the_same_every_time() -> None:
    step = method_step(TINY, "mlcm")
    before = [parameter.detach().clone() for parameter in step.learning]
    total, sizes = step.counted()
    assert any(not torch.equal(a, b) for a, b in zip(before, step.learning, strict=True))
    assert total == sum(sizes) + 2 * TINY.batch  # one backward pass, of the student
    assert step.counted() == (total, sizes)


def test_the_counted_time_is_that_of_forwards_at_the_step_s_own_sizes() -> None:
    times = {"forward 2": [1.0, 2.0], "forward 4": [1.5, 3.0]}
    assert counted_times(16.0, [2, 2, 4], times) == [16.0 * 3.5 / 8, 16.0 * 7.0 / 8]


def test_a_ratio_is_formed_within_each_round() -> None:
    bar = make_bar("P", "a / b", [2.0, 40.0, 6.0], [1.0, 10.0, 2.0], 2.5, at_least=True)
    assert (bar.ratio, bar.ratio_of_fastest, bar.passed) == (3.0, 2.0, True)
    assert not make_bar("P", "", [2.0], [1.0], 1.5, at_least=False).passed
    assert bar_line(replace(bar, passed=False)).endswith("a / b  missed")


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own() -> None:
    peaks = {batch: peak_bytes(replace(TINY, batch=batch, size=16), "lcm") for batch in (8, 64)}
    assert peaks[64] > peaks[8] > 0
