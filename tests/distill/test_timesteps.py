from __future__ import annotations

import diffusers
import pytest
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch.testing import assert_close

from distill.schedules import FlowSchedule, VPSchedule, schedule_from_config
from distill.timesteps import ddim_targets, dynamic_shift, timesteps, timesteps_from_config


@pytest.mark.parametrize("num_steps", [1, 4, 7, 30, 50, 999])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_vp_times_equal_those_of_ddim(spacing, num_steps):
    theirs = diffusers.DDIMScheduler(timestep_spacing=spacing)
    theirs.set_timesteps(num_steps)
    found = timesteps_from_config(VPSchedule.from_config(theirs.config), num_steps, theirs.config)
    assert_close(found.long(), theirs.timesteps)
    assert (found == found.round()).all()


def test_offset_is_read_from_the_configuration():
    theirs = diffusers.DDIMScheduler(steps_offset=1)
    theirs.set_timesteps(50)
    found = timesteps_from_config(VPSchedule(), 50, theirs.config)
    assert_close(found.long(), theirs.timesteps)


@pytest.mark.parametrize("num_steps", [1, 5, 28])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_times_equal_those_of_flow_match_euler(shift, num_steps):
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(num_steps)
    found = timesteps_from_config(schedule_from_config(theirs.config), num_steps, theirs.config)
    assert_close(found.float(), theirs.timesteps, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("num_tokens", [256, 1024, 4096])
@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_dynamically_shifted_times_equal_those_of_flux(kind, num_tokens):
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    mu = calculate_shift(num_tokens)
    theirs.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=mu)
    found = timesteps_from_config(FlowSchedule(), 4, theirs.config, num_tokens=num_tokens)
    assert_close(found.float(), theirs.timesteps, rtol=1e-6, atol=1e-4)


def test_flux_shift_at_the_published_ends():
    assert dynamic_shift({}, 4096) == pytest.approx(2.71828182845904**1.15)
    assert dynamic_shift({"time_shift_type": "linear"}, 256) == pytest.approx(0.5)


def test_instaflow_times():
    assert timesteps(FlowSchedule(), 4, "trailing").tolist() == [1000.0, 750.0, 500.0, 250.0]


def test_ddim_targets_follow_the_times_when_the_grid_is_even():
    schedule = VPSchedule()
    times = timesteps(schedule, 50, "trailing")
    targets = ddim_targets(schedule, times)
    assert_close(targets[:-1], times[1:])
    assert targets[-1] == schedule.final_t


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: timesteps(VPSchedule(), 0), "got 0"),
        (lambda: timesteps(VPSchedule(), 1001), "got 1001"),
        (lambda: timesteps(VPSchedule(), 5, "even"), "'even'"),
        (lambda: timesteps(VPSchedule(), 5, "trailing", steps_offset=1), "got 1 with trailing"),
        (lambda: timesteps(FlowSchedule(), 5, steps_offset=1), "no effect"),
        (lambda: timesteps(FlowSchedule(), 5, "leading"), "pure noise"),
        (lambda: timesteps_from_config(VPSchedule(), 5, {"use_karras_sigmas": True}), "use_karras_sigmas"),
        (lambda: timesteps_from_config(FlowSchedule(), 5, {"use_dynamic_shifting": True}), "num_tokens"),
        (lambda: dynamic_shift({"time_shift_type": "cubic"}, 9), "'cubic'"),
    ],
)
def test_mistakes_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
