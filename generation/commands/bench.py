"""``layton bench``: speeds as ratios."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from layton.errors import UsageError
from layton.folder import write_json

if TYPE_CHECKING:
    from generation.bench.decoding import BenchReport
    from layton.bench.distillation import DistillationReport


def bench(
    *,
    what: Literal["decoding", "distillation", "all"] = "all",
    json: Path | None = None,
    quick: bool = False,
    rounds: int = 5,
    threads: int = 1,
) -> None:
    """Measure decoding and distillation steps against peers, against limits, and against themselves.

    Decoding: against transformers, and against the model's linear layers alone, at the 38M and the 111M shape, as it is
    and with compiled steps where there is a C++ compiler.
    Distillation: an LCM step against diffusers' own arithmetic, in time and memory, and steps of the other methods
    against their counted cost. Everything is measured side by side in one run, with random weights; only the ratios
    mean something. Takes about ten minutes for decoding and five for distillation.

    Args:
        what: decoding, distillation or all.
        json: file for the figures.
        quick: the 38M shape, 48 codes and two rounds: about two minutes.
        rounds: interleaved repeats.
        threads: threads of torch; with one, CPU time is measured and neighbours matter less.
    """
    if rounds < 1 or threads < 1:
        raise UsageError(f"rounds and threads must be positive, got {rounds} and {threads}")
    import torch

    from layton.bench.report import bar_line

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    figures: dict[str, object] = {}
    try:
        for part in ("decoding", "distillation"):
            if what in (part, "all"):
                report = _decoding(quick, rounds) if part == "decoding" else _distillation(quick, rounds)
                figures[part] = report.as_json()
                sys.stdout.writelines(f"{bar_line(bar)}\n" for bar in report.bars)
    finally:
        torch.set_num_threads(before)
    if json is not None:
        write_json(json, figures)
        sys.stdout.write(f"{json}\n")


def _decoding(quick: bool, rounds: int) -> BenchReport:
    from generation.bench.decoding import SHAPES, BenchOptions, run_bench

    options = BenchOptions(rounds=2, num_codes=48, compiled=False) if quick else BenchOptions(rounds=rounds)
    return run_bench(SHAPES[:1] if quick else SHAPES, options)


def _distillation(quick: bool, rounds: int) -> DistillationReport:
    from layton.bench.distillation import SHAPE, DistillationOptions, run_distillation_bench

    return run_distillation_bench(SHAPE, DistillationOptions(rounds=2 if quick else rounds))
