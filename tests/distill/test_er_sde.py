from __future__ import annotations

from itertools import pairwise
from typing import get_args

import pytest
import torch
from torch.testing import assert_close

from distill.condition import Condition
from distill.denoiser import Prediction
from distill.er_sde import SDE_5, NoiseScale, NoiseScaleKind, effective_eta, er_sde, er_sde_step
from distill.samplers import ddim, sample
from distill.schedules import FlowSchedule, VPSchedule
from distill.solvers import ddim_step
from distill.toy import GaussianMixtureDenoiser

VP, FLOW = VPSchedule(), FlowSchedule()
KINDS = get_args(NoiseScaleKind)
NONE = Condition()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mixture(schedule=VP) -> GaussianMixtureDenoiser:
    means = torch.tensor([[-1.5], [0.2], [1.0]], dtype=torch.float64)
    return GaussianMixtureDenoiser(means, 0.15, schedule, weights=torch.tensor([0.3, 0.5, 0.2]).double())


# The functions as the paper's released solver lists them, written out once more.
PHI = {
    "ode": lambda lam: lam,
    "reverse_sde": lambda lam: lam**2,
    "sde_1": lambda lam: lam * (torch.exp(-1.0 / lam) + 10.0),
    "sde_2": lambda lam: lam**1.5,
    "sde_3": lambda lam: lam**2.5,
    "sde_4": lambda lam: lam**0.9 * torch.log10(1.0 + 100.0 * lam**1.5),
    "sde_5": lambda lam: lam * (torch.exp(lam**0.3) + 10.0),
}


def reference(denoiser, x, times, kind, order, points, generator):
    """The published recurrence, without this library's rearrangements."""
    phi, history = PHI[kind], []
    times = [*times.tolist(), 0.0]
    for t, s in pairwise(times):
        coef_t, coef_s = VP.coefficients(t), VP.coefficients(s)
        lam_t, lam_s = coef_t.sigma / coef_t.alpha, coef_s.sigma / coef_s.alpha
        x_0 = denoiser.predict(x, t, NONE).x_0
        r = phi(lam_s) / phi(lam_t)
        new = coef_s.alpha / coef_t.alpha * r * x + coef_s.alpha * (1 - r) * x_0
        if history and order >= 2:
            grid = lam_s + torch.arange(points).double() * (lam_t - lam_s) / points
            x_0_p, lam_p, d_p = history[-1]
            d = (x_0 - x_0_p) / (lam_t - lam_p)
            i_0 = (1 / phi(grid)).sum() * (lam_t - lam_s) / points
            new = new + coef_s.alpha * (lam_s - lam_t + phi(lam_s) * i_0) * d
            if d_p is not None and order == 3:
                d_2 = 2 * (d - d_p) / (lam_t - history[-2][1])
                i_1 = ((grid - lam_t) / phi(grid)).sum() * (lam_t - lam_s) / points
                new = new + coef_s.alpha * ((lam_s - lam_t) ** 2 / 2 + phi(lam_s) * i_1) * d_2
        else:
            d = None
        history.append((x_0, lam_t, d))
        if kind != "ode":
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            new = new + coef_s.alpha * (lam_s**2 - lam_t**2 * r**2).clamp(min=0).sqrt() * noise
        x = new
    return x


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_published_recurrence(kind, order, rand64):
    denoiser, times = mixture(), torch.tensor([999.0, 800.0, 610.0, 350.0, 90.0])
    x_T = rand64(6, 1)
    expected = reference(denoiser, x_T, times, kind, order, 50, seeded())
    solver = er_sde(NoiseScale(kind), order=order, points=50)
    found = sample(denoiser, x_T, times, NONE, solver=solver, final_t=0.0, generator=seeded())
    assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", [VP, FLOW], ids=["vp", "flow"])
def test_two_members_are_ddim(schedule, rand64):
    x_t, x_0, noise = rand64(3, 4), rand64(3, 4), rand64(3, 4)
    t, s = torch.tensor([990.0, 500.0, 40.0]), torch.tensor([700.0, 480.0, 3.0])
    coef_t, coef_s = schedule.coefficients(t), schedule.coefficients(s)
    prediction = Prediction(x_0, (x_t - coef_t.alpha[:, None] * x_0) / coef_t.sigma[:, None])
    still = er_sde_step(prediction, coef_t, coef_s, noise_scale=NoiseScale("ode"))
    assert_close(still, ddim_step(x_t, prediction, coef_t, coef_s))
    ancestral = er_sde_step(prediction, coef_t, coef_s, noise_scale=NoiseScale("reverse_sde"), noise=noise)
    assert_close(ancestral, ddim_step(x_t, prediction, coef_t, coef_s, eta=1.0, noise=noise))
    for kind in KINDS:  # every member is DDIM with its effective eta
        found = er_sde_step(prediction, coef_t, coef_s, noise_scale=NoiseScale(kind), noise=noise)
        for i, eta in enumerate(effective_eta(NoiseScale(kind), coef_t, coef_s).tolist()):
            one = slice(i, i + 1)
            alone = Prediction(x_0[one], prediction.eps[one])
            at_t, at_s = schedule.coefficients(t[one]), schedule.coefficients(s[one])
            assert_close(found[one], ddim_step(x_t[one], alone, at_t, at_s, eta=eta, noise=noise[one]))


def test_effective_eta_of_short_moves():
    # Known figures for moves of 8 times on Stable Diffusion's schedule.
    t = torch.tensor([999.0, 799.0, 599.0, 399.0, 199.0, 99.0])
    at_t, at_s = VP.coefficients(t), VP.coefficients(t - 8.0)
    expected = torch.tensor([0.57, 0.41, 0.32, 0.27, 0.22, 0.20]).double()
    assert_close(effective_eta(SDE_5, at_t, at_s), expected, rtol=0, atol=6e-3)
    assert_close(effective_eta(NoiseScale("sde_2"), at_t, at_s), torch.full((6,), 0.71).double(), rtol=0, atol=0.01)
    assert effective_eta(NoiseScale("ode"), at_t, at_s).abs().max() == 0.0


@pytest.mark.parametrize("schedule", [VP, FLOW], ids=["vp", "flow"])
@pytest.mark.parametrize("kind", KINDS)
def test_keeps_the_marginal(kind, schedule, rand64):
    # With the true x_0 and eps, x_s must be distributed as alpha_s x_0 + sigma_s N(0, 1). 2e5 draws: sd error 0.16 %.
    size = 200_000
    x_0, eps, noise = torch.full((size,), 0.7).double(), rand64(size), rand64(size)
    t, s = schedule.coefficients(800.0), schedule.coefficients(300.0)
    x_s = er_sde_step(Prediction(x_0, eps), t, s, noise_scale=NoiseScale(kind), noise=noise)
    assert x_s.mean().item() == pytest.approx(0.7 * s.alpha.item(), abs=7e-3)
    assert x_s.std().item() == pytest.approx(s.sigma.item(), rel=7e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_off_is_the_ode(kind, rand64):
    # Where a function keeps all of the old noise (equal noise levels in the limit), fresh noise has no say.
    coef = VP.coefficients(500.0)
    prediction = Prediction(rand64(2, 3), rand64(2, 3))
    found = er_sde_step(prediction, coef, coef, noise_scale=NoiseScale(kind), noise=rand64(2, 3))
    assert_close(found, ddim_step(rand64(2, 3), prediction, coef, coef))


def wasserstein(found: torch.Tensor, exact: GaussianMixtureDenoiser) -> float:
    """Distance to the data's own distribution, from its quantiles."""
    truth = exact.draw(100 * len(found), seeded(7)).flatten().sort().values.reshape(-1, 100).mean(1)
    return (found.flatten().sort().values - truth).abs().mean().item()


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("kind", ["ode", "reverse_sde", "sde_5"])
def test_converges_to_the_mixture(kind, order):
    exact = mixture()
    x_T = torch.randn(2000, 1, generator=seeded(1), dtype=torch.float64)
    solver = er_sde(NoiseScale(kind), order=order, quadrature="simpson", points=10)
    errors = []
    for num_steps in (5, 40):
        times = torch.linspace(999.0, 999.0 / num_steps, num_steps).double()
        errors.append(wasserstein(sample(exact, x_T, times, NONE, solver=solver, generator=seeded(2)), exact))
    assert errors[0] > 1.5 * errors[1]
    assert errors[1] < 0.08  # as many true draws are about 0.03 away


@pytest.mark.parametrize("order", [2, 3])
def test_higher_order_is_closer_to_the_exact_trajectory(order):
    exact = mixture()
    x_T = torch.randn(200, 1, generator=seeded(3), dtype=torch.float64)
    times = torch.linspace(999.0, 100.0, 30).double()
    wanted = exact.cdf(x_T, 999.0)  # kept along the trajectory
    errors = []
    for solver in (ddim, er_sde(NoiseScale("ode"), order=order, quadrature="simpson")):
        x_s = sample(exact, x_T, times, NONE, solver=solver, final_t=80.0)
        errors.append((exact.cdf(x_s, 80.0) - wanted).abs().mean().item())
    assert errors[1] < 0.5 * errors[0]


def test_both_quadratures_agree_with_the_known_integral():
    # For phi = l the integral of the second-order correction is lambda_s log(lambda_t / lambda_s).
    from distill.er_sde import _integral

    lam_t, lam_s = torch.tensor([2.0, 0.5]).double(), torch.tensor([1.5, 0.05]).double()
    exact = lam_s * (lam_t / lam_s).log()
    for quadrature, points, tolerance in (("simpson", 20, 1e-6), ("riemann", 20_000, 1e-3)):
        found = _integral(NoiseScale("ode"), lam_t, lam_s, torch.ones_like, quadrature, points)
        assert_close(found, exact, rtol=tolerance, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_finite_from_pure_noise_to_clean(kind):
    for schedule in (FLOW, VPSchedule(rescale_betas_zero_snr=True)):
        exact = GaussianMixtureDenoiser(torch.zeros(1, 3).double(), 0.5, schedule, prediction_type="v")
        x_T = torch.randn(4, 3, generator=seeded(4), dtype=torch.float64)
        times = torch.tensor([schedule.terminal_t, 700.0, 500.0, 300.0])
        solver = er_sde(NoiseScale(kind), order=3)
        assert sample(exact, x_T, times, NONE, solver=solver, generator=seeded()).isfinite().all()


def test_a_seed_decides_everything():
    exact, times = mixture(), torch.tensor([900.0, 500.0, 100.0])
    x_T = torch.randn(5, 1, generator=seeded(5), dtype=torch.float64)

    def run(seed: int) -> torch.Tensor:
        return sample(exact, x_T, times, NONE, solver=er_sde(order=2), generator=seeded(seed))

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


def test_refuses_what_has_no_meaning(rand64):
    prediction, coef = Prediction(rand64(1, 2), rand64(1, 2)), VP.coefficients(500.0)
    with pytest.raises(ValueError, match="sde_5 needs noise"):
        er_sde_step(prediction, coef, VP.coefficients(400.0))
    with pytest.raises(ValueError, match="got 4"):
        er_sde(order=4)
    with pytest.raises(ValueError, match="even for simpson, got 7"):
        er_sde(quadrature="simpson", points=7)
    with pytest.raises(ValueError, match=r"got 1\.0"):
        NoiseScale("sde_1", eta=1.0)
    with pytest.raises(ValueError, match="only applies to sde_1"):
        NoiseScale("sde_2", eta=0.5)
