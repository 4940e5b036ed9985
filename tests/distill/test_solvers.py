from __future__ import annotations

import diffusers
import pytest
import torch
from torch.testing import assert_close

from distill.condition import Condition
from distill.denoiser import Prediction
from distill.parameterization import Coefficients, change_schedule
from distill.schedules import FlowSchedule, VPSchedule
from distill.solvers import ddim_step, dpmpp_2m_step, euler_step, heun_step
from distill.toy import GaussianMixtureDenoiser

VP, FLOW = VPSchedule(), FlowSchedule()


def at(schedule, t: float) -> Coefficients:
    return schedule.coefficients(t)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_stochastic_ddim_step_equals_diffusers(eta, rand64):
    theirs = diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
    ours = VPSchedule.from_config(theirs.config)
    theirs.set_timesteps(20)
    x_t, eps, noise = rand64(2, 4, 4, 4), rand64(2, 4, 4, 4), rand64(2, 4, 4, 4)
    for t in (951, 501, 51):
        expected = theirs.step(eps, t, x_t, eta=eta, variance_noise=noise if eta else None).prev_sample
        x_0 = (x_t - at(ours, t).sigma * eps) / at(ours, t).alpha
        found = ddim_step(x_t, Prediction(x_0, eps), at(ours, t), at(ours, t - 50), eta=eta, noise=noise)
        assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("schedule", [VP, FLOW], ids=["vp", "flow"])
@pytest.mark.parametrize("eta", [0.2, 1.0])
def test_stochastic_step_keeps_the_marginal(schedule, eta, rand64):
    # With the true x_0 and eps, x_s must be distributed as alpha_s x_0 + sigma_s N(0, 1). 4e5 draws: sd error 0.1 %.
    size = 400_000
    x_0, eps, noise = torch.full((size,), 0.7).double(), rand64(size), rand64(size)
    t, s = at(schedule, 700.0), at(schedule, 300.0)
    x_s = ddim_step(schedule.add_noise(x_0, eps, 700.0), Prediction(x_0, eps), t, s, eta=eta, noise=noise)
    assert x_s.mean().item() == pytest.approx(0.7 * s.alpha.item(), abs=5e-3)
    assert x_s.std().item() == pytest.approx(s.sigma.item(), rel=5e-3)


def test_euler_is_ddim_on_every_schedule(rand64):
    x_0, eps = rand64(2, 3), rand64(2, 3)
    for schedule in (VP, FLOW):
        t, s = at(schedule, 800.0), at(schedule, 350.5)
        x_t = schedule.add_noise(x_0, eps, 800.0)
        prediction = Prediction(x_0, eps)
        assert_close(euler_step(x_t, prediction, t, s), ddim_step(x_t, prediction, t, s))


def test_flow_euler_and_vp_ddim_end_at_the_same_state(rand64):
    t, s = at(VP, 800.0), at(VP, 300.0)
    flow_t, flow_s = (at(FLOW, float(FLOW.t_from_lambda(VP.lambda_t(time)))) for time in (800.0, 300.0))
    x_t, x_0 = rand64(2, 3), rand64(2, 3)
    prediction = Prediction(x_0, (x_t - t.alpha * x_0) / t.sigma)
    z_s = euler_step(change_schedule(x_t, t, flow_t), prediction, flow_t, flow_s)
    assert_close(change_schedule(z_s, flow_s, s), ddim_step(x_t, prediction, t, s))


def test_a_perfect_prediction_lands_on_the_truth_in_any_step(rand64):
    x_0, eps = rand64(2, 3), rand64(2, 3)
    prediction = Prediction(x_0, eps)
    for schedule in (VP, FLOW):
        before, t, s = at(schedule, 950.0), at(schedule, 800.0), at(schedule, 100.0)
        x_t, x_s = schedule.add_noise(x_0, eps, 800.0), schedule.add_noise(x_0, eps, 100.0)
        assert_close(heun_step(x_t, prediction, prediction, t, s), x_s)
        assert_close(dpmpp_2m_step(x_t, prediction, t, s, previous=prediction, coef_previous=before), x_s)
        clean = at(schedule, schedule.clean_t)
        assert_close(euler_step(x_t, prediction, t, clean), x_0)
        assert_close(ddim_step(x_t, prediction, t, clean, eta=1.0, noise=eps), x_0)


def test_steps_from_pure_noise_are_finite(rand64):
    schedule = VPSchedule(rescale_betas_zero_snr=True)
    exact = GaussianMixtureDenoiser(rand64(3, 2), 0.4, schedule, prediction_type="v")
    x_t, noise = rand64(5, 2), rand64(5, 2)
    prediction = exact.predict(x_t, 999.0, Condition())
    t, s = at(schedule, 999), at(schedule, 500)
    for x_s in (
        ddim_step(x_t, prediction, t, s),
        ddim_step(x_t, prediction, t, s, eta=1.0, noise=noise),
        euler_step(x_t, prediction, t, s),
    ):
        assert x_s.isfinite().all()


def test_per_sample_times_equal_one_by_one(rand64):
    x_0, eps, noise = rand64(3, 4), rand64(3, 4), rand64(3, 4)
    t, s = torch.tensor([900.0, 500.0, 80.0]), torch.tensor([300.0, 499.0, 0.0])
    x_t = VP.add_noise(x_0, eps, t)
    together = ddim_step(x_t, Prediction(x_0, eps), VP.coefficients(t), VP.coefficients(s), eta=0.7, noise=noise)
    for i in range(3):
        one = slice(i, i + 1)
        single = ddim_step(
            x_t[one], Prediction(x_0[one], eps[one]), at(VP, t[i]), at(VP, s[i]), eta=0.7, noise=noise[one]
        )
        assert_close(together[one], single)


def test_noise_must_come_from_the_caller(rand64):
    prediction = Prediction(rand64(1, 2), rand64(1, 2))
    with pytest.raises(ValueError, match=r"0\.5 needs noise"):
        ddim_step(rand64(1, 2), prediction, at(VP, 500), at(VP, 400), eta=0.5)
    with pytest.raises(ValueError, match=r"-1\.0"):
        ddim_step(rand64(1, 2), prediction, at(VP, 500), at(VP, 400), eta=-1.0)
