from __future__ import annotations

import copy
import math

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from distill.schedules import FlowSchedule, NoiseSchedule, VPSchedule, dynamic_shift, schedule_from_config

SD = VPSchedule()
SCHEDULES = {
    "sd": SD,
    "linear": VPSchedule(beta_schedule="linear", beta_start=1e-4, beta_end=0.02),
    "cosine": VPSchedule(beta_schedule="squaredcos_cap_v2"),
    "zero-snr": VPSchedule(rescale_betas_zero_snr=True),
    "flow": FlowSchedule(),
}


@pytest.fixture(params=SCHEDULES)
def schedule(request) -> NoiseSchedule:
    return SCHEDULES[request.param]


def grid(schedule: NoiseSchedule, num: int = 997) -> torch.Tensor:
    return torch.linspace(schedule.clean_t, schedule.terminal_t, num, dtype=torch.float64)


def test_time_survives_a_trip_through_lambda(schedule):
    t = grid(schedule)
    assert_close(schedule.t_from_lambda(schedule.lambda_t(t)), t, rtol=0, atol=1e-8)


def test_lambda_survives_a_trip_through_time(schedule):
    lam = torch.cat([torch.zeros(1, dtype=torch.float64), torch.logspace(-3, 1, 200, dtype=torch.float64)])
    assert_close(schedule.lambda_t(schedule.t_from_lambda(lam)), lam, rtol=1e-10, atol=0)


@given(t=st.floats(-1, 998.9), higher=st.floats(1e-6, 100))
@settings(max_examples=200, deadline=None)
def test_noise_grows_with_time(t, higher):
    later = min(t + higher, 999.0)
    assert SD.lambda_t(later) > SD.lambda_t(t) or later == t


def test_lambda_is_sigma_over_alpha_and_ends_are_exact(schedule):
    t = grid(schedule)
    coef = schedule.coefficients(t)
    assert_close(coef.sigma / coef.alpha, schedule.lambda_t(t))
    assert (coef.alpha[0].item(), coef.sigma[0].item()) == (1.0, 0.0)
    assert coef.alpha.isfinite().all() and coef.sigma.isfinite().all()
    assert (coef.alpha.diff() < 0).all() and (coef.sigma.diff() > 0).all()


def test_vp_keeps_variance_and_flow_keeps_the_sum():
    for name, schedule in SCHEDULES.items():
        coef = schedule.coefficients(grid(schedule))
        total = coef.alpha + coef.sigma if name == "flow" else coef.alpha**2 + coef.sigma**2
        assert_close(total, torch.ones_like(total), rtol=1e-14, atol=0)


def test_log_lambda_is_linear_between_rows():
    low, middle, high = SD.lambda_t(torch.tensor([400.0, 400.25, 401.0])).log()
    assert_close(middle, 0.75 * low + 0.25 * high)


def test_interpolated_noise_has_no_jump_at_rows(schedule):
    rows = torch.arange(0, int(schedule.terminal_t), dtype=torch.float64)
    before = schedule.coefficients(rows - 1e-9 if schedule.clean_t < 0 else rows)
    assert_close(before.sigma, schedule.coefficients(rows).sigma, rtol=0, atol=1e-8)


def test_published_end_of_stable_diffusion_schedule():
    # lambda_999 = 14.61; in flow time the schedule starts at s = 0.064.
    lam = SD.lambda_t(999).item()
    assert lam == pytest.approx(14.61, abs=5e-3)
    assert 1 / (1 + lam) == pytest.approx(0.064, abs=5e-4)


def test_zero_terminal_snr_ends_in_pure_noise():
    coef = SCHEDULES["zero-snr"].coefficients(999)
    assert (coef.alpha.item(), coef.sigma.item()) == (0.0, 1.0)
    assert math.isinf(SCHEDULES["zero-snr"].lambda_t(999))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": [0.01, 0.02, 0.05, 0.1]},
        {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True},
        {"beta_schedule": "linear", "num_train_timesteps": 200},
    ],
)
def test_table_equals_that_of_diffusers(options):
    theirs = diffusers.DDIMScheduler(**options)
    ours = VPSchedule.from_config(theirs.config)
    assert_close(ours.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=2e-5, atol=1e-7)
    assert ours.num_train_timesteps == len(theirs.alphas_cumprod)


@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_final_noise_level_is_that_of_diffusers(set_alpha_to_one):
    theirs = diffusers.DDIMScheduler(set_alpha_to_one=set_alpha_to_one)
    ours = schedule_from_config(theirs.config)
    assert_close(ours.coefficients(ours.final_t).alpha ** 2, theirs.final_alpha_cumprod.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["DDPM", "PNDM", "EulerDiscrete", "DPMSolverMultistep", "LCM", "UniPCMultistep"])
def test_any_vp_scheduler_configuration_is_understood(name):
    theirs = getattr(diffusers, f"{name}Scheduler")(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    ours = schedule_from_config(theirs.config)
    assert isinstance(ours, VPSchedule)
    assert_close(ours.alphas_cumprod, SD.alphas_cumprod)


def test_flow_configurations_are_understood():
    config = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config
    assert schedule_from_config(config) == FlowSchedule(shift=3.0)
    config = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0).config
    assert schedule_from_config(config) == FlowSchedule()
    assert schedule_from_config(config, num_tokens=4096).shift == pytest.approx(math.exp(1.15))
    config = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=2.0
    ).config
    assert schedule_from_config(config) == FlowSchedule(shift=2.0)


def test_shift_equals_that_of_diffusers():
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = FlowSchedule(shift=3.0).shift_t(torch.arange(1000, 0, -1))
    assert_close(ours.float(), theirs.timesteps, rtol=1e-6, atol=0)


def test_shifted_times_stay_on_the_clock_whatever_the_size():
    for side in range(16, 258, 2):
        schedule = FlowSchedule(shift=dynamic_shift({}, (side // 2) ** 2))
        assert float(schedule.shift_t(schedule.terminal_t)) <= 1000.0
        schedule.coefficients(schedule.shift_t(schedule.terminal_t))


def test_add_noise_equals_that_of_diffusers(rand64):
    x_0, eps, t = rand64(3, 4, 2, 2), rand64(3, 4, 2, 2), torch.tensor([0, 371, 999])
    theirs = diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    assert_close(SD.add_noise(x_0, eps, t), theirs.add_noise(x_0, eps, t), rtol=0, atol=1e-5)


def test_shape_and_dtype_of_times_do_not_matter():
    t = torch.tensor([[3, 7], [500, 999]])
    assert SD.coefficients(t).alpha.shape == (2, 2)
    assert_close(SD.coefficients(t.int()).alpha, SD.coefficients(t.float()).alpha, rtol=0, atol=0)
    assert_close(SD.coefficients(7).sigma, SD.coefficients(t).sigma[0, 1], rtol=0, atol=0)


def test_schedule_works_on_the_meta_device_and_copies():
    t = torch.zeros(2, device="meta")
    for schedule in SCHEDULES.values():
        assert copy.deepcopy(schedule).coefficients(t).alpha.device.type == "meta"
        assert schedule.t_from_lambda(t).shape == (2,)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SD.coefficients(1000), "got 1000"),
        (lambda: SD.coefficients(torch.tensor([3.0, -1.5])), "-1.5"),
        (lambda: SD.coefficients(float("nan")), "nan"),
        (lambda: FlowSchedule().lambda_t(-1e-3), r"-0\.001"),
        (lambda: SD.t_from_lambda(-1.0), "-1.0"),
        (lambda: FlowSchedule(shift=0.0), r"got 0\.0"),
        (lambda: VPSchedule(beta_schedule="exp"), "'exp'"),
        (lambda: VPSchedule(trained_betas=[0.1, 1.5]), r"1\.5"),
        (lambda: VPSchedule(trained_betas=[]), "empty"),
        (lambda: VPSchedule(num_train_timesteps=0), "got 0"),
        (lambda: schedule_from_config({"a": 1}), r"\['a'\]"),
        (lambda: schedule_from_config({"beta_schedule": "linear", "beta_start": "x"}), "'x'"),
        (lambda: schedule_from_config({"beta_schedule": 3}), "got 3"),
        (lambda: schedule_from_config({"beta_schedule": "linear", "num_train_timesteps": 9.5}), r"9\.5"),
        (lambda: schedule_from_config({"shift": 1.0, "invert_sigmas": True}), "invert_sigmas"),
    ],
)
def test_mistakes_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
