from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from distill.condition import Condition
from distill.denoiser import Denoiser
from distill.er_sde import NoiseScale, er_sde
from distill.moves import SolverSettings, guide, guide_lcm, move, sub_times
from distill.samplers import ddim, ddim_eta, sample
from distill.schedules import FlowSchedule, VPSchedule
from distill.toy import GaussianMixtureDenoiser

VP, FLOW = VPSchedule(), FlowSchedule()
NONE = Condition()


class Affine(Denoiser):
    """Predicts ``scale * x_t`` plus the mean of its text: guidance has something to tell apart."""

    def __init__(self, scale: float = 0.9) -> None:
        super().__init__(VP, "eps")
        self.scale = torch.nn.Parameter(torch.tensor(scale, dtype=torch.float64))

    def forward(self, x_t, t, condition):
        return self.scale * x_t + condition.embeds.mean((1, 2))[:, None, None, None]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("solver", [ddim, ddim_eta(0.3), er_sde(), er_sde(order=2)])
def test_a_batch_at_mixed_times_equals_one_by_one(solver, rand64):
    exact = GaussianMixtureDenoiser(rand64(3, 2), 0.3, VP)
    x_t, t, s = rand64(3, 2), torch.tensor([999.0, 400.0, 10.0]), torch.tensor([975.0, 376.0, 0.0])
    together = move(exact, x_t, t, s, NONE, num_steps=3, solver=solver, generator=[seeded(i) for i in range(3)])
    for i in range(3):
        times = torch.linspace(t[i], s[i], 4, dtype=torch.float64)
        one = slice(i, i + 1)
        alone = sample(exact, x_t[one], times[:-1], NONE, solver=solver, targets=times[1:], generator=[seeded(i)])
        assert_close(together[one], alone)


def test_sub_times_are_equal_and_end_exactly():
    times = sub_times(torch.tensor([999.0, 24.0]), torch.tensor([975.0, 0.0]), 3)
    assert times.tolist() == [[999.0, 24.0], [991.0, 16.0], [983.0, 8.0], [975.0, 0.0]]


@pytest.mark.parametrize("schedule", [VP, FLOW], ids=["vp", "flow"])
def test_more_sub_steps_come_closer_to_the_exact_trajectory(schedule, rand64):
    exact = GaussianMixtureDenoiser(rand64(1, 2), 0.4, schedule)
    x_t, t, s = rand64(8, 2), torch.full((8,), 700.0), torch.full((8,), 300.0)
    truth = exact.transport(x_t, 700.0, 300.0)
    errors = [(move(exact, x_t, t, s, NONE, num_steps=h) - truth).abs().mean().item() for h in (1, 4, 16)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_moves_carry_no_gradient(rand64):
    teacher, condition = Affine(), Condition(embeds=rand64(2, 3, 4))
    x_s = move(teacher, rand64(2, 4, 2, 2), torch.tensor([500.0, 100.0]), torch.tensor([480.0, 80.0]), condition)
    assert not x_s.requires_grad


def test_the_two_conventions_of_guidance_are_one_apart(rand64):
    teacher, x_t, t = Affine(), rand64(2, 4, 2, 2), torch.tensor([500.0, 100.0])
    condition, null = Condition(embeds=rand64(2, 3, 4)), Condition(embeds=torch.zeros(1, 3, 4).double())
    eps, eps_null = teacher(x_t, t, condition), teacher(x_t, t, null.expand(2))
    w = torch.tensor([2.0, 14.0]).double()
    weight = w[:, None, None, None]
    lcm_formula = (1 + weight) * eps - weight * eps_null  # arXiv 2310.04378, eq. 13
    assert_close(guide_lcm(teacher, w, null)(x_t, t, condition), lcm_formula)
    assert_close(guide(teacher, w + 1.0, null)(x_t, t, condition), lcm_formula)
    trap = guide(teacher, w, null)(x_t, t, condition)
    assert_close(lcm_formula - trap, eps - eps_null)  # what the mistake costs: one unit of guidance
    assert guide(teacher, 1.0, Condition()) is teacher
    assert_close(guide_lcm(teacher, 0.0, null)(x_t, t, condition), eps)


def test_guidance_uses_the_networks_own_guidance_input_in_both_halves(rand64):
    seen = []

    class Told(Affine):
        def forward(self, x_t, t, condition):
            seen.append(condition.guidance)
            return super().forward(x_t, t, condition)

    condition = Condition(embeds=rand64(2, 3, 4), guidance=torch.tensor([3.5, 4.5]))
    null = Condition(embeds=rand64(1, 3, 4), guidance=torch.tensor([0.0]))
    guide(Told(), 2.0, null)(rand64(2, 4, 2, 2), torch.tensor([5.0, 5.0]), condition)
    assert seen[0].tolist() == [3.5, 4.5, 3.5, 4.5]


def test_settings_name_solvers():
    assert SolverSettings().make() is ddim
    exact = GaussianMixtureDenoiser(torch.zeros(1, 2).double(), 0.4, VP)
    x_t, t, s = torch.ones(2, 2).double(), torch.tensor([500.0, 500.0]), torch.tensor([400.0, 400.0])
    # reverse_sde and eta = 1 are the same solver
    settings = (SolverSettings("er_sde", noise_scale=NoiseScale("reverse_sde")), SolverSettings("ddim", eta=1.0))
    first, second = (move(exact, x_t, t, s, NONE, solver=one.make(), generator=seeded()) for one in settings)
    assert_close(first, second)


def test_refuses_moves_and_settings_without_meaning(rand64):
    exact = GaussianMixtureDenoiser(rand64(1, 2), 0.4, VP)
    with pytest.raises(ValueError, match="smaller time"):
        move(exact, rand64(1, 2), torch.tensor([0.0]), torch.tensor([0.0]), NONE)
    with pytest.raises(ValueError, match="got 0"):
        sub_times(torch.tensor([5.0]), torch.tensor([1.0]), 0)
    with pytest.raises(ValueError, match="needs a generator"):
        move(exact, rand64(1, 2), torch.tensor([9.0]), torch.tensor([1.0]), NONE, solver=er_sde())
    with pytest.raises(ValueError, match=r"eta is DDIM's.*0\.2"):
        SolverSettings("er_sde", eta=0.2)
    with pytest.raises(ValueError, match="order = 2"):
        SolverSettings("ddim", order=2)
