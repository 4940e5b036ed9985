"""S(Z): zero for straight flows, known for curved ones, and the same for equal models on two schedules."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from distill.condition import Condition
from distill.denoiser import Denoiser, RescheduledDenoiser
from distill.samplers import euler, sample
from distill.schedules import FlowSchedule, VPSchedule
from distill.straightness import as_flow, straightness
from distill.toy import GaussianMixtureDenoiser

NONE = Condition()


class Field(Denoiser):
    """Velocity ``dZ/ds = a s`` everywhere, straight for none but ``a = 0``; plus a constant."""

    def __init__(self, slope: float) -> None:
        super().__init__(FlowSchedule(), "flow")
        self.slope = slope

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        s = (1 - t / 1000).to(x_t.dtype)[:, None]
        return -(self.slope * s + 5.0).expand_as(x_t)


def test_a_constant_velocity_is_straight(rand64):
    assert straightness(Field(0.0), rand64(3, 4), NONE, num_steps=5).mean == pytest.approx(0.0, abs=1e-12)


def test_a_growing_velocity_has_its_variance(rand64):
    # v = a s, s uniform: variance a^2 / 12 (1 - 1 / N^2) on N steps
    found = straightness(Field(6.0), rand64(3, 4), NONE, num_steps=50)
    assert found.mean == pytest.approx(3.0 * (1 - 1 / 2500), rel=1e-9)
    assert found.standard_error == pytest.approx(0.0, abs=1e-9)
    assert found.per_sample.shape == (3,) and found.per_step.shape == (50,)


def test_it_does_not_depend_on_the_schedule_the_model_lives_on(rand64):
    means = rand64(3, 2)
    noise = rand64(64, 2)
    vp = GaussianMixtureDenoiser(means, 0.2, VPSchedule())
    flow = GaussianMixtureDenoiser(means, 0.2, FlowSchedule(), prediction_type="flow")
    for start in (0.1, 0.3):
        one = straightness(vp, noise, NONE, num_steps=20, start_s=start)
        other = straightness(flow, noise, NONE, num_steps=20, start_s=start)
        assert_close(one.per_sample, other.per_sample, rtol=1e-3, atol=1e-5)


def test_exact_conversion_ends_where_ddim_ends(rand64):
    vp = GaussianMixtureDenoiser(rand64(3, 2), 0.3, VPSchedule())
    x_T = rand64(16, 2)
    times = torch.tensor([999.0, 700.0, 400.0, 150.0, 20.0], dtype=torch.float64)
    flow = as_flow(vp)
    assert isinstance(flow, RescheduledDenoiser)
    coef = vp.schedule.coefficients(999.0)
    z = x_T / (coef.alpha + coef.sigma)
    flow_times = flow.schedule.t_from_lambda(vp.schedule.lambda_t(times))
    assert_close(sample(flow, z, flow_times, NONE, solver=euler), sample(vp, x_T, times, NONE))


def test_trajectories_begin_where_a_sampler_does(rand64):
    vp = GaussianMixtureDenoiser(rand64(3, 2), 0.3, VPSchedule())
    coef = vp.schedule.coefficients(999.0)
    noise, start = rand64(16, 2), float(coef.alpha / (coef.alpha + coef.sigma))
    seen = []
    flow = as_flow(vp)
    predict = flow.predict
    flow.predict = lambda z, t, condition: seen.append(z) or predict(z, t, condition)
    straightness(flow, noise, NONE, num_steps=4, start_s=start)
    assert_close(seen[0], noise / (coef.alpha + coef.sigma))


@pytest.mark.parametrize(("steps", "start"), [(1, 0.0), (5, 1.0), (5, -0.1)])
def test_nonsense_is_refused(rand64, steps, start):
    with pytest.raises(ValueError, match=r"num_steps|start_s"):
        straightness(Field(0.0), rand64(1, 2), NONE, num_steps=steps, start_s=start)
