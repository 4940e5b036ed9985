"""Known answers: exact transport of one Gaussian, kept quantiles and marginals of mixtures, orders of convergence."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from distill.condition import Condition
from distill.samplers import ddim, ddim_eta, dpmpp_2m, euler, heun, sample
from distill.schedules import FlowSchedule, VPSchedule
from distill.timesteps import timesteps
from distill.toy import GaussianMixtureDenoiser

NONE = Condition()
SCHEDULES = {"vp": VPSchedule(), "flow": FlowSchedule()}


@pytest.fixture(params=SCHEDULES)
def schedule(request):
    return SCHEDULES[request.param]


def mixture_1d(schedule, std=0.25) -> GaussianMixtureDenoiser:
    means = torch.tensor([[-1.5], [0.2], [1.8]], dtype=torch.float64)
    weights = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    # v: noise alone says nothing about the image at pure noise, where flows start.
    return GaussianMixtureDenoiser(means, std, schedule, weights=weights, prediction_type="v")


def even_in_lambda(schedule, num_steps: int, start: float, stop: float) -> torch.Tensor:
    """N + 1 times from ``start`` to ``stop``, geometric in lambda: smooth, so that orders show."""
    ends = schedule.lambda_t(torch.tensor([start, stop])).log()
    return schedule.t_from_lambda(torch.linspace(ends[0], ends[1], num_steps + 1, dtype=torch.float64).exp())


@pytest.mark.parametrize(
    ("solver", "order"), [(ddim, 1), (euler, 1), (heun, 2), (dpmpp_2m, 2)], ids=["ddim", "euler", "heun", "dpmpp_2m"]
)
def test_trajectories_converge_to_the_exact_transport_with_their_order(solver, order, schedule, rand64):
    exact = GaussianMixtureDenoiser(rand64(1, 3), 0.5, schedule)
    x_T = rand64(16, 3)
    truth = exact.transport(x_T, 950.0, 20.0)

    def error(num_steps):
        times = even_in_lambda(schedule, num_steps, 950.0, 20.0)
        found = sample(exact, x_T, times[:-1], NONE, solver=solver, final_t=float(times[-1]))
        return (found - truth).abs().max().item()

    assert math.log2(error(32) / error(64)) == pytest.approx(order, abs=0.2)
    assert error(64) < (0.1 if order == 1 else 5e-3)


@pytest.mark.parametrize(("solver", "order"), [(ddim, 1), (heun, 2), (dpmpp_2m, 2)], ids=["ddim", "heun", "dpmpp_2m"])
def test_mixture_trajectories_keep_their_quantile(solver, order, schedule):
    exact = mixture_1d(schedule)
    x_T = torch.linspace(-2, 2, 41, dtype=torch.float64)[:, None]
    truth = exact.cdf(x_T, 950.0)

    def error(num_steps):
        times = even_in_lambda(schedule, num_steps, 950.0, 20.0)
        found = sample(exact, x_T, times[:-1], NONE, solver=solver, final_t=float(times[-1]))
        return (exact.cdf(found, 20.0) - truth).abs().mean().item()

    assert math.log2(error(64) / error(128)) == pytest.approx(order, abs=0.35)
    assert error(128) < (0.03 if order == 1 else 2e-3)


@pytest.mark.parametrize("solver", [ddim, heun, dpmpp_2m, ddim_eta(1.0)], ids=["ddim", "heun", "dpmpp_2m", "ddpm"])
def test_sampled_distribution_is_the_data_distribution(solver, schedule):
    # Starting from noise, quantiles under the data distribution are uniform. KS distance of 4,000 exact samples is
    # 0.021 on average, above 0.031 once in a thousand; SD's schedule also starts slightly short of pure noise.
    exact = mixture_1d(schedule, std=0.4)
    generator = torch.Generator().manual_seed(0)
    x_T = torch.randn(4000, 1, generator=generator, dtype=torch.float64)
    found = sample(exact, x_T, timesteps(schedule, 100, "trailing"), NONE, solver=solver, generator=generator)
    quantiles = exact.cdf(found, schedule.clean_t).flatten().sort().values
    uniform = torch.linspace(0, 1, len(quantiles), dtype=torch.float64)
    assert (quantiles - uniform).abs().max() < 0.045


def test_draws_follow_the_cdf():
    exact = mixture_1d(VPSchedule())
    x_0 = exact.draw(20_000, torch.Generator().manual_seed(2))
    quantiles = exact.cdf(x_0, -1.0).flatten().sort().values
    assert (quantiles - torch.linspace(0, 1, 20_000, dtype=torch.float64)).abs().max() < 0.014


def test_transport_there_and_back_is_the_identity(schedule, rand64):
    exact = GaussianMixtureDenoiser(rand64(1, 4, 2, 2), 0.7, schedule)
    x = rand64(3, 4, 2, 2)
    assert_close(exact.transport(exact.transport(x, 900.0, 10.0), 10.0, 900.0), x)


def test_prediction_of_the_clean_state_is_itself(schedule, rand64):
    exact = mixture_1d(schedule)
    x = rand64(5, 1)
    prediction = exact.predict(x, schedule.clean_t, NONE)
    assert_close(prediction.x_0, x)


def test_mistakes_are_named(rand64):
    with pytest.raises(ValueError, match="got 0"):
        GaussianMixtureDenoiser(rand64(1, 2), 0.0, VPSchedule())
    with pytest.raises(ValueError, match=r"2 weights"):
        GaussianMixtureDenoiser(rand64(2, 2), 1.0, VPSchedule(), weights=rand64(3))
    with pytest.raises(ValueError, match="got 3"):
        mixture_1d(VPSchedule()).transport(rand64(1, 1), 9.0, 1.0)
