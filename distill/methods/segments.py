"""Segments of the time axis: where multistep consistency distillation jumps to, and where its students are evaluated.

M segments are bounded by milestones ``t_0 < t_1 < ... < t_M``: the clean end, M - 1 inner borders, and the noisiest
time. A student learns to jump from anywhere in a segment to the segment's lower end (arXiv 2406.05768).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

import torch
from torch import Tensor

from distill.schedules import FlowSchedule, NoiseSchedule, VPSchedule, working_dtype

Grouping = Literal["sample", "batch"]

GRID_SEGMENTS = 8
INFERENCE_INDICES: Mapping[int, tuple[int, ...]] = MappingProxyType(
    {
        1: (0,),
        2: (0, 4),
        3: (0, 4, 7),
        4: (0, 2, 4, 7),
        5: (0, 2, 4, 6, 7),
        6: (0, 2, 4, 5, 6, 7),
        7: (0, 2, 3, 4, 5, 6, 7),
        8: (0, 1, 2, 3, 4, 5, 6, 7),
    }
)
"""Places on the grid of 8 segments for each number of steps (TLCM ``inference.py``; 1 is ours)."""


def milestones(schedule: NoiseSchedule, num_segments: int) -> Tensor:
    """Borders ``t_0 .. t_M`` of M equal segments, ascending.

    On a variance-preserving schedule of 1000 times they are the published integers 124, 249, ..., 999; the lowest is
    the clean end (-1 there), where the jump is the prediction of ``x_0`` itself. On a flow schedule they are equal
    parts of [0, T], moved by the schedule's resolution shift.

    Args:
        schedule: The student's schedule.
        num_segments: M.

    Returns:
        (M + 1,) float64 on the network's clock, strictly increasing.

    Raises:
        ValueError: Fewer than one segment, or so many that two borders fall together.
    """
    if not 1 <= num_segments <= schedule.terminal_t:
        raise ValueError(f"num_segments must lie in [1, {schedule.terminal_t:g}], got {num_segments}")
    grid = torch.linspace(0.0, schedule.terminal_t, num_segments + 1, dtype=torch.float64)
    # 1e-9: an integer that the division missed by a rounding error must not become the one below.
    grid = (grid + 1e-9).floor() if isinstance(schedule, VPSchedule) else to_clock(schedule, grid)
    grid[0] = schedule.clean_t
    return grid


def inference_times(schedule: NoiseSchedule, num_steps: int) -> Tensor:
    """Times at which a student of MLCM or TLCM is evaluated, noisiest first: the published table for 2 to 8 steps.

    Args:
        schedule: The student's schedule; VP schedules of 1000 times give TLCM's integers 999, 874, 749, 624, 499, 374,
            249, 124, flow schedules the same fractions of their range (shifted as the schedule asks).
        num_steps: 1 to 8.

    Returns:
        (num_steps,) float64, strictly decreasing.

    Raises:
        ValueError: Another number of steps.
    """
    if num_steps not in INFERENCE_INDICES:
        raise ValueError(f"num_steps must lie in [1, {GRID_SEGMENTS}], got {num_steps}")
    grid = milestones(schedule, GRID_SEGMENTS).flip(0)
    return grid[list(INFERENCE_INDICES[num_steps])]


def to_clock(schedule: NoiseSchedule, u: Tensor) -> Tensor:
    """Evenly spread numbers as times that the network knows, the inverse of `from_clock`.

    Integers for tabulated (VP) schedules; for flows the resolution shift is applied, as the teacher's own sampler does,
    so that "equal steps" means equal steps of that sampler.
    """
    if isinstance(schedule, FlowSchedule):
        return schedule.shift_t(u)
    return u.round() if isinstance(schedule, VPSchedule) else u


def from_clock(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """Times with the resolution shift of a flow schedule undone; other times as they are."""
    if not isinstance(schedule, FlowSchedule):
        return t
    sigma = t / schedule.num_train_timesteps
    return schedule.num_train_timesteps * sigma / (schedule.shift - (schedule.shift - 1.0) * sigma)


@dataclass(frozen=True, slots=True, eq=False)
class SegmentTimes:
    """One training time per sample, and the segment it lies in. All (B,)."""

    segment: Tensor  # int64 on the CPU, 0 (clean) .. M - 1 (noisiest)
    t_m: Tensor  # where the student jumps from, in (t_s, t_{s+1}]
    t_s: Tensor  # where it jumps to: the segment's lower end


def draw_times(
    schedule: NoiseSchedule,
    num_segments: int,
    batch_size: int,
    *,
    generator: torch.Generator,
    device: torch.device,
    grouping: Grouping = "sample",
) -> SegmentTimes:
    """Draw times uniformly over the segments and uniformly within them, both by stratification over the batch.

    Args:
        schedule: The student's schedule.
        num_segments: M.
        batch_size: B.
        generator: Source of the draws.
        device: Where the times go.
        grouping: ``"sample"`` gives each sample its own segment, evenly over the batch: low variance, and the same
            cost at every step once B is a multiple of M. ``"batch"`` draws one segment for the whole batch: equal
            shapes throughout (compiled networks), at the price of steps of unequal cost.

    Raises:
        ValueError: Unknown grouping.
    """
    if grouping not in get_args(Grouping):
        raise ValueError(f"grouping must be one of {get_args(Grouping)}, got {grouping!r}")
    where = generator.device
    rank = torch.randperm(batch_size, generator=generator, device=where)
    jitter = torch.rand(batch_size, generator=generator, device=where, dtype=torch.float32)
    place = ((rank + jitter) / batch_size).cpu().double().clamp(max=1.0 - 1e-6)
    if grouping == "batch":
        segment = torch.randint(num_segments, (1,), generator=generator, device=where).cpu().expand(batch_size)
    else:
        segment = (place * num_segments).long()
        place = place * num_segments - segment
    borders = milestones(schedule, num_segments)
    t_s = borders[segment]
    low, high = from_clock(schedule, t_s), from_clock(schedule, borders[segment + 1])
    u = high - place * (high - low)
    t_m = u.ceil() if isinstance(schedule, VPSchedule) else to_clock(schedule, u)
    dtype = working_dtype(device)
    return SegmentTimes(segment, t_m.to(dtype).to(device), t_s.to(dtype).to(device))
