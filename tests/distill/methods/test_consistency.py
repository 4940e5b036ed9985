from __future__ import annotations

import pytest
import torch
from diffusers import LCMScheduler
from torch.testing import assert_close

from distill.condition import Condition
from distill.methods.consistency import (
    ConsistencyFunction,
    ConsistencySettings,
    distance,
    draw_guidance,
    draw_pair,
    grid,
    inference_grid,
    with_guidance,
)
from distill.schedules import FlowSchedule, VPSchedule
from distill.toy import GaussianMixtureDenoiser

VP, FLOW = VPSchedule(), FlowSchedule()
NONE = Condition()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 7, 8, 50])
@pytest.mark.parametrize("num_points", [50, 100])
def test_inference_times_equal_diffusers(num_steps, num_points):
    theirs = LCMScheduler(original_inference_steps=num_points)
    theirs.set_timesteps(num_steps)
    assert inference_grid(VP, num_steps, num_points).tolist() == theirs.timesteps.tolist()


def test_the_flow_grid_starts_at_pure_noise_and_follows_the_shift():
    assert grid(FLOW, 50)[[0, -1]].tolist() == [20.0, 1000.0]
    assert inference_grid(FLOW, 4).tolist() == [1000.0, 760.0, 500.0, 260.0]
    shifted = inference_grid(FlowSchedule(shift=3.0), 2)
    assert_close(shifted, torch.tensor([1000.0, 750.0]).double())  # 3 * 0.5 / (1 + 2 * 0.5)


def test_pairs_are_a_grid_point_and_a_skip_below_it():
    t, s = draw_pair(VP, 2000, seeded(), num_points=50, skip=20.0)
    assert set(t.tolist()) == set(range(19, 1000, 20))
    assert torch.equal(s, (t - 20).clamp(min=0))
    t, s = draw_pair(VP, 5000, seeded(), num_points=1000, skip=24.0)
    assert bool((s < t).all()) and t.min() >= 1 and t.max() <= 999
    t, s = draw_pair(FlowSchedule(shift=3.0), 2000, seeded(), num_points=50, skip=20.0)
    assert bool((s < t).all()) and t.max() == 1000.0 and s.min() == 0.0


@pytest.mark.parametrize("kind", ["l2", "pseudo_huber"])
def test_distances_equal_the_scripts(kind, rand64):
    a, b = rand64(3, 4, 2, 2), rand64(3, 4, 2, 2)
    expected = ((a - b) ** 2).mean() if kind == "l2" else (((a - b) ** 2 + 0.001**2).sqrt() - 0.001).mean()
    assert_close(distance(a, b, kind), expected)
    assert distance(a, a, kind).item() == 0.0
    alone = torch.stack([distance(a[i : i + 1], b[i : i + 1], kind) for i in range(3)])
    weight = torch.tensor([0.0, 2.0, 1.0]).double()
    assert_close(distance(a, b, kind, weight=weight), (weight * alone).mean())


def test_distance_of_half_precision_is_single():
    one = torch.full((1, 2), 1e-4, dtype=torch.float16)
    assert distance(one, torch.zeros_like(one), "l2").item() == pytest.approx(1e-8, rel=1e-2)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_boundary_is_the_identity_at_zero(prediction, rand64):
    exact = GaussianMixtureDenoiser(rand64(2, 3), 0.4, VP, prediction_type=prediction)
    x = rand64(2, 3)
    t = torch.zeros(2)
    assert torch.equal(ConsistencyFunction(exact)(x, t, NONE), x)
    assert not torch.equal(ConsistencyFunction(exact, "none")(x, t, NONE), x)
    t = torch.full((2,), 500.0)
    expected = exact.predict(x, t, NONE).x_0
    assert torch.equal(ConsistencyFunction(exact, "none")(x, t, NONE), expected)
    assert_close(ConsistencyFunction(exact)(x, t, NONE), expected, rtol=1e-3, atol=1e-3)


def test_guidance_is_drawn_in_its_range_and_told_to_the_student(rand64):
    scales = draw_guidance((3.0, 15.0), 500, seeded())
    assert scales.min() >= 3.0 and scales.max() <= 15.0 and scales.max() - scales.min() > 11.0
    assert draw_guidance((7.5, 7.5), 500, seeded()) == 7.5
    told = with_guidance(Condition(embeds=rand64(2, 3, 4)), 7.5, rand64(2, 1))
    assert told.guidance.tolist() == [7.5, 7.5]


def test_settings_without_meaning_are_refused():
    for changes, message in (
        ({"skip": 0.0}, "positive"),
        ({"guidance_range": (0.5, 2.0)}, r"0\.5"),
        ({"guidance_range": (9.0, 2.0)}, r"9\.0"),
        ({"distance": "l1"}, "l1"),
        ({"boundary": "edm"}, "edm"),
    ):
        with pytest.raises(ValueError, match=message):
            ConsistencySettings(**changes)
    with pytest.raises(ValueError, match="51"):
        inference_grid(VP, 51)
