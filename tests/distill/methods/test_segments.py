"""Milestones, drawn times and the published inference table."""

from __future__ import annotations

import pytest
import torch

from distill.methods.segments import draw_times, from_clock, inference_times, milestones, to_clock
from distill.schedules import FlowSchedule, VPSchedule

PUBLISHED = {
    1: [999],
    2: [999, 499],
    3: [999, 499, 124],
    4: [999, 749, 499, 124],
    5: [999, 749, 499, 249, 124],
    6: [999, 749, 499, 374, 249, 124],
    7: [999, 749, 624, 499, 374, 249, 124],
    8: [999, 874, 749, 624, 499, 374, 249, 124],
}


def test_inference_times_are_the_published_ones() -> None:
    for count, times in PUBLISHED.items():
        assert inference_times(VPSchedule(), count).tolist() == times
    with pytest.raises(ValueError, match="9"):
        inference_times(VPSchedule(), 9)


def test_flow_times_are_the_same_fractions_and_take_the_shift() -> None:
    assert inference_times(FlowSchedule(), 4).tolist() == [1000, 750, 500, 125]
    shifted = FlowSchedule(shift=3.0)
    assert torch.allclose(inference_times(shifted, 4), shifted.shift_t(inference_times(FlowSchedule(), 4)))
    u = torch.linspace(0, 1000, 11, dtype=torch.float64)
    assert torch.allclose(from_clock(shifted, to_clock(shifted, u)), u)


@pytest.mark.parametrize("schedule", [VPSchedule(), FlowSchedule(), FlowSchedule(shift=3.0)])
def test_milestones_nest_as_segments_halve(schedule) -> None:
    eight = milestones(schedule, 8)
    assert eight[0] == schedule.clean_t and eight[-1] == schedule.terminal_t
    assert bool((eight.diff() > 0).all())
    assert torch.equal(milestones(schedule, 4), eight[::2]) and torch.equal(milestones(schedule, 2), eight[::4])


@pytest.mark.parametrize("schedule", [VPSchedule(), FlowSchedule(shift=3.0)])
def test_drawn_times_lie_in_their_segments_and_fill_them(schedule) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = draw_times(schedule, 8, 4000, generator=generator, device=torch.device("cpu"))
    borders = milestones(schedule, 8)
    assert bool((drawn.t_m > drawn.t_s).all()) and bool((drawn.t_m <= borders[drawn.segment + 1]).all())
    assert torch.equal(drawn.t_s, borders[drawn.segment])
    assert drawn.segment.bincount(minlength=8).tolist() == [500] * 8  # stratified
    part = (from_clock(schedule, drawn.t_m) - from_clock(schedule, drawn.t_s)) / (1000 / 8)
    assert abs(float(part.mean()) - 0.5) < 0.02 and float(part.min()) < 0.02 and float(part.max()) > 0.98
    if isinstance(schedule, VPSchedule):
        assert torch.equal(drawn.t_m, drawn.t_m.round()) and drawn.t_m.min() == 0 and drawn.t_m.max() == 999


def test_one_segment_for_a_batch_where_asked_for() -> None:
    found = set()
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        drawn = draw_times(VPSchedule(), 4, 6, generator=generator, device=torch.device("cpu"), grouping="batch")
        assert len(set(drawn.segment.tolist())) == 1 and len(set(drawn.t_m.tolist())) > 1
        found.add(int(drawn.segment[0]))
    assert found == {0, 1, 2, 3}
    with pytest.raises(ValueError, match="'rank'"):
        draw_times(VPSchedule(), 4, 6, generator=generator, device=torch.device("cpu"), grouping="rank")  # type: ignore[arg-type]
