"""Ratios against a goal, and how they were measured.

Times of another machine, or of another minute of this one, say little. So every round measures all contenders one after
another, a ratio is formed in each round, and the median ratio is reported (with the ratio of the fastest times beside
it). With one thread the clock is that of the thread's CPU time, which neighbours disturb less than the wall clock.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

Clock = Callable[[], float]
"""Seconds, from anywhere."""

Times = dict[str, list[float]]
"""For each contender seconds by round."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One ratio.

    Attributes:
        name: Such as "P2 38M".
        text: What is divided by what.
        ratio: Median over rounds of the ratio in a round.
        ratio_of_fastest: The same from the fastest times of all rounds.
        goal: What it should be.
        at_least: Whether more is better.
        passed: Whether the goal is met.
    """

    name: str
    text: str
    ratio: float
    ratio_of_fastest: float
    goal: float
    at_least: bool
    passed: bool


def make_bar(
    name: str,
    text: str,
    over: Sequence[float],
    under: Sequence[float],
    goal: float,
    *,
    at_least: bool,
    factor: float = 1.0,
) -> Bar:
    """A bar of two contenders' measurements.

    Args:
        name: See `Bar`.
        text: See `Bar`.
        over: Measurements by round, to be divided
        under: by these.
        goal: See `Bar`.
        at_least: See `Bar`.
        factor: On the ratio.
    """
    ratio = factor * median(a / b for a, b in zip(over, under, strict=True))
    fastest = factor * min(over) / min(under)
    return Bar(name, text, ratio, fastest, goal, at_least, ratio >= goal if at_least else ratio <= goal)


def bar_line(bar: Bar) -> str:
    """A bar as a line of text."""
    sign, told = (">=" if bar.at_least else "<="), ("" if bar.passed else "  missed")
    return f"{bar.name:<12}{bar.ratio:6.2f} {sign} {bar.goal:<6}{bar.text}{told}"


def bench_clock() -> Clock:
    """CPU time of this thread where torch has one, else the wall clock."""
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


class Protocol:
    """How a run was measured; made at its beginning."""

    def __init__(self, clock: Clock) -> None:
        self._clock = "thread CPU time" if clock is time.thread_time else "wall"
        self._load = os.getloadavg()

    def as_json(self) -> dict[str, object]:
        """Clock, threads, version of torch, and the machine's load before and now."""
        return {
            "clock": self._clock,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "load_before": list(self._load),
            "load_after": list(os.getloadavg()),
        }
