"""``layton bench``: speeds as ratios."""

from __future__ import annotations

import sys
from pathlib import Path

from layton.commands.reports import write_json
from layton.errors import UsageError


def bench(*, json: Path | None = None, quick: bool = False, rounds: int = 5, threads: int = 1) -> None:
    """Measure decoding against transformers, against the model's linear layers alone, and against itself.

    Everything is measured side by side in one run, with random weights at the 38M and the 111M shape; only the ratios
    mean something. Takes about ten minutes.

    Args:
        json: file for the figures.
        quick: the 38M shape, 48 codes and two rounds: about a minute.
        rounds: interleaved repeats.
        threads: threads of torch; with one, CPU time is measured and neighbours matter less.
    """
    if rounds < 1 or threads < 1:
        raise UsageError(f"rounds and threads must be positive, got {rounds} and {threads}")
    import torch

    from generation.bench import SHAPES, BenchOptions, run_bench

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        options = BenchOptions(rounds=2, num_codes=48) if quick else BenchOptions(rounds=rounds)
        report = run_bench(SHAPES[:1] if quick else SHAPES, options)
    finally:
        torch.set_num_threads(before)
    for bar in report.bars:
        sign, told = (">=" if bar.at_least else "<="), ("" if bar.passed else "  missed")
        sys.stdout.write(f"{bar.name:<10}{bar.ratio:6.2f} {sign} {bar.goal:<6}{bar.text}{told}\n")
    if json is not None:
        write_json(json, report.as_json())
        sys.stdout.write(f"{json}\n")
