from __future__ import annotations

import diffusers
import pytest
import torch
from torch.testing import assert_close

from distill.condition import Condition
from distill.denoiser import Denoiser
from distill.noise import gaussian_like
from distill.samplers import ddim, ddim_eta, euler, heun, lcm_boundary, renoise_sample, sample
from distill.schedules import FlowSchedule, VPSchedule, schedule_from_config
from distill.timesteps import ddim_targets, timesteps, timesteps_from_config

NONE = Condition()
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
NAMES = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


class DummyDenoiser(Denoiser):
    """A deterministic, bounded, nonlinear function of state and time, as a stand-in for a trained network."""

    def forward(self, x_t, t, condition):
        return torch.tanh(x_t.roll(1, dims=-1) + 1e-3 * t.to(x_t)[:, None, None, None])


def ddim_loop(scheduler, denoiser, x, num_steps):
    scheduler.set_timesteps(num_steps)
    for t in scheduler.timesteps:
        output = denoiser(x, t.expand(len(x)), NONE)
        x = scheduler.step(output, int(t), x).prev_sample
    return x


@pytest.mark.parametrize("num_steps", [4, 30, 50])
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_ddim_sampling_equals_diffusers(spacing, prediction, set_alpha_to_one, num_steps, rand64):
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        timestep_spacing=spacing,
        prediction_type=prediction,
        set_alpha_to_one=set_alpha_to_one,
        steps_offset=1 if spacing == "leading" else 0,
    )
    schedule = schedule_from_config(scheduler.config)
    denoiser = DummyDenoiser(schedule, NAMES[prediction])
    x_T = rand64(2, 4, 8, 8)
    times = timesteps_from_config(schedule, num_steps, scheduler.config)
    found = sample(denoiser, x_T, times, NONE, targets=ddim_targets(schedule, times))
    expected = ddim_loop(scheduler, denoiser, x_T, num_steps)
    assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    # What remains is the rounding of diffusers' float32 table: with ours in its place nothing does.
    scheduler.alphas_cumprod = schedule.alphas_cumprod
    scheduler.final_alpha_cumprod = schedule.coefficients(schedule.final_t).alpha ** 2
    assert_close(found, ddim_loop(scheduler, denoiser, x_T, num_steps), rtol=1e-10, atol=1e-10)


def test_float32_sampling_equals_diffusers(rand64):
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", clip_sample=False, prediction_type="v_prediction"
    )
    schedule = schedule_from_config(scheduler.config)
    denoiser, x_T = DummyDenoiser(schedule, "v"), rand64(2, 4, 8, 8).float()
    found = sample(denoiser, x_T, timesteps(schedule, 50), NONE)
    assert found.dtype == torch.float32
    assert_close(found, ddim_loop(scheduler, denoiser, x_T, 50), **TOLERANCE)


def test_zero_terminal_snr_sampling_equals_diffusers(rand64):
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear",
        clip_sample=False,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
    )
    schedule = schedule_from_config(scheduler.config)
    denoiser, x_T = DummyDenoiser(schedule, "v"), rand64(2, 4, 8, 8)
    found = sample(denoiser, x_T, timesteps(schedule, 20, "trailing"), NONE)
    assert_close(found, ddim_loop(scheduler, denoiser, x_T, 20), **TOLERANCE)


@pytest.mark.parametrize("num_steps", [1, 4, 28])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("solver", [euler, ddim])
def test_flow_sampling_equals_flow_match_euler(solver, shift, num_steps, rand64):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    schedule = schedule_from_config(scheduler.config)
    denoiser, x = DummyDenoiser(schedule, "flow"), rand64(2, 4, 8, 8).float()
    found = sample(denoiser, x, timesteps(schedule, num_steps), NONE, solver=solver)
    scheduler.set_timesteps(num_steps)
    for t in scheduler.timesteps:
        x = scheduler.step(denoiser(x, t.expand(2), NONE), t, x).prev_sample
    assert_close(found, x, **TOLERANCE)


def test_stochastic_sampling_equals_diffusers(rand64):
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", clip_sample=False, prediction_type="v_prediction"
    )
    schedule = schedule_from_config(scheduler.config)
    denoiser, x = DummyDenoiser(schedule, "v"), rand64(2, 4, 8, 8)
    generator = torch.Generator().manual_seed(3)
    found = sample(denoiser, x, timesteps(schedule, 10), NONE, solver=ddim_eta(1.0), generator=generator)
    scheduler.set_timesteps(10)
    generator.manual_seed(3)
    for t in scheduler.timesteps:
        x = scheduler.step(denoiser(x, t.expand(2), NONE), int(t), x, eta=1.0, generator=generator).prev_sample
    assert_close(found, x, **TOLERANCE)


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
def test_renoise_sampling_equals_the_lcm_scheduler(num_steps, rand64):
    scheduler = diffusers.LCMScheduler(clip_sample=False, prediction_type="v_prediction")
    denoiser = DummyDenoiser(schedule_from_config(scheduler.config), "v")
    scheduler.set_timesteps(num_steps)
    x = rand64(2, 4, 8, 8)
    generator = torch.Generator().manual_seed(5)
    found = renoise_sample(denoiser, x, scheduler.timesteps, NONE, generator=generator, boundary=lcm_boundary)
    generator.manual_seed(5)
    for t in scheduler.timesteps:
        x = scheduler.step(denoiser(x, t.expand(2), NONE), t, x, generator=generator).prev_sample
    assert_close(found, x, **TOLERANCE)


def test_flow_renoising_is_that_of_tlcm(rand64):
    # x_0 = x - sigma u; x' = sigma' noise + (1 - sigma') x_0
    denoiser, x = DummyDenoiser(FlowSchedule(), "flow"), rand64(1, 4, 8, 8)
    found = renoise_sample(denoiser, x, torch.tensor([1000, 400]), NONE, generator=torch.Generator().manual_seed(1))
    x_0 = x - denoiser(x, torch.tensor([1000.0]), NONE)
    x = 0.4 * gaussian_like(x, torch.Generator().manual_seed(1)) + 0.6 * x_0
    assert_close(found, x - 0.4 * denoiser(x, torch.tensor([400.0]), NONE))


def test_each_sample_has_its_own_noise_whatever_the_batch(rand64):
    denoiser, x = DummyDenoiser(VPSchedule(), "v"), rand64(3, 4, 8, 8)
    times = torch.tensor([999, 499, 124])

    def seeds(*numbers):
        return [torch.Generator().manual_seed(number) for number in numbers]

    together = renoise_sample(denoiser, x, times, NONE, generator=seeds(7, 8, 9))
    alone = renoise_sample(denoiser, x[1:2], times, NONE, generator=seeds(8))
    assert_close(together[1:2], alone)
    other = renoise_sample(denoiser, x, times, NONE, generator=seeds(7, 0, 9))
    assert not torch.allclose(other[1], together[1]) and torch.equal(other[0], together[0])


def test_boundary_is_the_identity_at_zero():
    c_skip, c_out = lcm_boundary(torch.tensor([0.0, 1.0, 999.0]))
    assert (c_skip[0], c_out[0]) == (1.0, 0.0)
    assert (c_skip[1:] < 0.003).all() and (c_out[1:] > 0.998).all()


def test_times_per_sample_equal_one_by_one(rand64):
    denoiser, x = DummyDenoiser(VPSchedule(), "v"), rand64(2, 4, 8, 8)
    times = torch.tensor([[900.0, 500.0], [400.0, 200.0], [100.0, 50.0]])
    together = sample(denoiser, x, times, NONE, solver=heun)
    for i in range(2):
        assert_close(together[i : i + 1], sample(denoiser, x[i : i + 1], times[:, i], NONE, solver=heun))


def test_sampling_in_two_parts_equals_sampling_at_once(rand64):
    denoiser, x = DummyDenoiser(VPSchedule(), "v"), rand64(2, 4, 8, 8)
    times = timesteps(denoiser.schedule, 10, "trailing")
    middle = sample(denoiser, x, times[:6], NONE, final_t=float(times[6]))
    assert_close(sample(denoiser, middle, times[6:], NONE), sample(denoiser, x, times, NONE), rtol=0, atol=0)


def test_callback_sees_every_step_in_order(rand64):
    denoiser, seen = DummyDenoiser(VPSchedule(), "v"), []
    x, times = rand64(1, 4, 8, 8), torch.tensor([900.0, 500.0, 100.0, 50.0])
    result = sample(denoiser, x, times, NONE, callback=lambda step, x_s: seen.append((step, x_s)))
    assert [step.index for step, _ in seen] == [0, 1, 2, 3]
    assert [float(step.t) for step, _ in seen] == times.tolist()
    assert float(seen[-1][0].s) == -1.0 and seen[-1][0].lands_clean
    assert torch.equal(seen[-1][1], result)
    first, second = seen[3][0].previous.previous, seen[3][0].previous
    assert (first.index, second.index, first.previous) == (1, 2, None)  # two predecessors, not a growing chain


def test_gradients_reach_the_starting_noise(rand64):
    x = rand64(1, 4, 8, 8).requires_grad_()
    sample(DummyDenoiser(VPSchedule(), "v"), x, torch.tensor([999.0, 499.0]), NONE).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def bad(**changes):
    denoiser = DummyDenoiser(VPSchedule(), "v")
    options = {"times": torch.tensor([900.0, 100.0])} | changes
    return lambda: sample(denoiser, torch.zeros(2, 4, 8, 8), options.pop("times"), NONE, **options)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (bad(times=torch.tensor([100.0, 900.0])), "decrease"),
        (bad(times=torch.zeros(0)), "N >= 1"),
        (bad(times=torch.tensor([[900.0] * 3])), "B = 2"),
        (bad(times=torch.tensor([1200.0])), "1200"),
        (bad(targets=torch.zeros(3)), "shape"),
        (bad(targets=torch.zeros(2), final_t=0.0), "not both"),
        (bad(solver=ddim_eta(1.0)), "generator"),
        (bad(solver=ddim_eta(1.0), generator=[torch.Generator()]), "or 2 of them, got 1"),
    ],
)
def test_mistakes_are_named(act, message):
    with pytest.raises(ValueError, match=message):
        act()


def test_renoising_without_a_generator_is_refused():
    with pytest.raises(ValueError, match="generator"):
        renoise_sample(DummyDenoiser(VPSchedule(), "v"), torch.zeros(1, 4, 8, 8), torch.tensor([999, 499]), NONE)
