"""Reflow straightens; pairs are what the teacher makes; exact and reinterpreted readings agree with their formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from distill.condition import Condition
from distill.denoiser import Denoiser
from distill.method import DistillBatch, Networks
from distill.methods.pairs import Pair, TeacherSolver, pair_of
from distill.methods.reflow import Reflow, VelocityDenoiser, flow_times, interpolate
from distill.samplers import euler, sample
from distill.schedules import FlowSchedule, VPSchedule
from distill.straightness import straightness
from distill.timesteps import uniform_flow_times
from distill.toy import GaussianMixtureDenoiser

NONE = Condition()


class MLP(Denoiser):
    """A small network on points of the plane, float64."""

    def __init__(self, schedule, prediction_type: str, width: int = 64) -> None:
        super().__init__(schedule, prediction_type)
        self.net = nn.Sequential(
            nn.Linear(4, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
        ).double()

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        s = (t / 1000)[:, None].double()
        points = x_t.flatten(1).double()
        return self.net(torch.cat([points, s, s**2], 1)).reshape(x_t.shape)


class Shifted(Denoiser):
    """A mixture whose prediction is shifted by the condition, to tell guided from unguided."""

    def __init__(self, inner: Denoiser) -> None:
        super().__init__(inner.schedule, inner.prediction_type)
        self.inner = inner

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        assert condition.pooled is not None
        return self.inner(x_t, t, NONE) + condition.pooled.reshape(-1, 1, 1, 1).to(x_t)


def two_points(schedule, prediction_type: str = "eps") -> GaussianMixtureDenoiser:
    means = torch.tensor([[2.0, 1.0], [-2.0, 1.0]], dtype=torch.float64).reshape(2, 2, 1, 1)
    return GaussianMixtureDenoiser(means, 0.3, schedule, prediction_type=prediction_type)


def batch_of(size: int, pair: Pair | None = None) -> DistillBatch:
    condition = Condition(pooled=torch.zeros(size, 1))
    if pair is None:
        return DistillBatch(condition, Condition(), (2, 1, 1))
    return DistillBatch(condition, Condition(), (2, 1, 1), x_0=pair.x_0, noise=pair.noise)


def noise_of(size: int, seed: int) -> Tensor:
    return torch.randn(size, 2, 1, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_reflow_halves_the_curvature_and_keeps_one_step_closer_to_the_data():
    teacher = two_points(FlowSchedule(), "flow")
    solver = TeacherSolver("euler", num_steps=50)
    noise = noise_of(1024, 1)
    pair = Pair(noise, solver.solve(teacher, noise, NONE))
    torch.manual_seed(0)
    student = MLP(FlowSchedule(), "flow")
    method = Reflow(solver=solver)
    optimizer = torch.optim.Adam(student.parameters(), lr=5e-3)
    networks = Networks(student, teacher, student)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    for step in range(400):
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(1024, (256,), generator=generator)
        batch = batch_of(256, Pair(noise[rows], pair.x_0[rows]))
        loss = method.losses(networks, batch, step=step, generator=generator).terms["reflow"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    fresh = noise_of(512, 2)
    before = straightness(teacher, fresh, NONE, num_steps=25).mean
    after = straightness(student, fresh, NONE, num_steps=25).mean
    assert after < 0.5 * before, (before, after)
    truth = solver.solve(teacher, fresh, NONE)
    with torch.no_grad():
        one = [sample(network, fresh, uniform_flow_times(network.schedule, 1), NONE) for network in (teacher, student)]
    errors = [float((x - truth).square().mean()) for x in one]
    assert errors[1] < 0.5 * errors[0], errors


@pytest.mark.parametrize("prediction_type", ["eps", "v", "x0"])
@pytest.mark.parametrize("space", ["velocity", "network"])
def test_a_model_that_is_straight_has_no_loss_whatever_it_predicts(prediction_type, space):
    # one Gaussian of no width: every trajectory runs straight to the same point
    point = torch.tensor([[1.0, -1.0]], dtype=torch.float64).reshape(1, 2, 1, 1)
    model = GaussianMixtureDenoiser(point, 1e-9, VPSchedule(), prediction_type=prediction_type)
    pair = Pair(noise_of(64, 3), point.expand(64, 2, 1, 1))
    method = Reflow(space=space, time_samples=2)
    loss = method.losses(
        Networks(model, model, model), batch_of(64, pair), step=0, generator=torch.Generator().manual_seed(0)
    ).terms["reflow"]
    assert loss.item() < 1e-12


def test_the_network_space_is_the_error_of_the_networks_own_output():
    # one time only: then both spaces differ by the square of the gain
    pair = Pair(noise_of(1, 4), noise_of(1, 5))
    schedule = VPSchedule()
    torch.manual_seed(0)
    model = MLP(schedule, "eps")
    method = Reflow(space="network")
    loss = method.losses(
        Networks(model, model, model), batch_of(1, pair), step=0, generator=torch.Generator().manual_seed(0)
    ).terms["reflow"]
    s = flow_times(1, torch.Generator().manual_seed(0))
    x_t, t = interpolate(schedule, pair, s)
    assert_close(loss, (model(x_t, t, NONE) - pair.noise).square().mean())


def test_states_beyond_the_schedules_end_are_pure_noise_at_its_last_time():
    schedule = VPSchedule()
    pair = Pair(noise_of(3, 6), noise_of(3, 7))
    x_t, t = interpolate(schedule, pair, torch.tensor([0.0, 0.05, 0.5], dtype=torch.float64))
    assert t[:2].tolist() == [999.0, 999.0] and t[2] < 999
    assert_close(x_t[:2], pair.noise[:2], rtol=0, atol=0)
    coef = schedule.coefficients(t[2])
    assert float(coef.sigma / coef.alpha) == pytest.approx(1.0)


def test_on_a_flow_the_state_is_the_straight_line_and_the_clock_runs_down():
    pair = Pair(noise_of(2, 8), noise_of(2, 9))
    x_t, t = interpolate(FlowSchedule(), pair, torch.tensor([0.0, 0.25], dtype=torch.float64))
    assert t.tolist() == [1000.0, 750.0]
    assert_close(x_t[0], pair.noise[0])
    assert_close(x_t[1], 0.75 * pair.noise[1] + 0.25 * pair.x_0[1])


def test_a_reinterpreted_network_is_sampled_as_the_released_pipeline_does():
    torch.manual_seed(0)
    network = MLP(VPSchedule(), "eps")
    flow = VelocityDenoiser(network)
    noise = noise_of(4, 10)
    latents, steps = noise, 4
    for i in range(steps):
        clock = torch.full((4,), (1 - i / steps) * 1000.0, dtype=torch.float64)
        latents = latents + network(latents, clock, NONE) / steps
    assert_close(sample(flow, noise, uniform_flow_times(flow.schedule, steps), NONE, solver=euler), latents)


def test_pairs_of_the_batch_are_used_and_others_are_the_teachers():
    teacher = two_points(VPSchedule())
    solver = TeacherSolver("ddim", num_steps=7)
    given = Pair(noise_of(4, 11), noise_of(4, 12))
    used = pair_of(batch_of(4, given), teacher, solver, torch.Generator())
    assert used.noise is given.noise and used.x_0 is given.x_0
    made = pair_of(batch_of(4), teacher, solver, torch.Generator().manual_seed(3))
    again = pair_of(batch_of(4), teacher, solver, torch.Generator().manual_seed(3))
    assert_close(made.x_0, again.x_0, rtol=0, atol=0)
    assert_close(made.x_0, solver.solve(teacher, made.noise, NONE), rtol=0, atol=0)


def test_guidance_moves_pairs_and_an_empty_null_condition_means_none():
    teacher = Shifted(two_points(VPSchedule()))
    noise = noise_of(2, 13)
    condition = Condition(pooled=torch.full((2, 1), 0.1))
    null = Condition(pooled=torch.zeros(1, 1))
    plain = TeacherSolver("ddim", 5).solve(teacher, noise, condition, null)
    pushed = TeacherSolver("ddim", 5, guidance_scale=3.0).solve(teacher, noise, condition, null)
    tripled = TeacherSolver("ddim", 5).solve(teacher, noise, Condition(pooled=torch.full((2, 1), 0.3)), null)
    assert_close(pushed, tripled)
    assert not torch.allclose(pushed, plain)
    without = TeacherSolver("ddim", 5, guidance_scale=3.0).solve(teacher, noise, condition, Condition())
    assert_close(without, plain, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "count"), [("ddim", 10), ("dpmpp_2m", 10), ("heun", 19)])
def test_evaluations_are_counted_as_they_happen(name, count):
    calls = 0

    class Counting(GaussianMixtureDenoiser):
        def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            nonlocal calls
            calls += 1
            return super().forward(x_t, t, condition)

    teacher = Counting(torch.zeros(1, 2, 1, 1, dtype=torch.float64), 1.0, VPSchedule())
    solver = TeacherSolver(name, num_steps=10)
    solver.solve(teacher, noise_of(1, 0), NONE)
    assert calls == count == solver.evaluations()
    assert solver.evaluations(guided=True) == 2 * count


def test_inference_times_divide_the_flow_equally():
    assert uniform_flow_times(FlowSchedule(), 4).tolist() == [1000.0, 750.0, 500.0, 250.0]
    for steps in (60, 70):  # times of the same number, and one before the first
        with pytest.raises(ValueError, match=f"{steps} equal steps of the flow time share times"):
            uniform_flow_times(VPSchedule(), steps)
    times = uniform_flow_times(VPSchedule(), 4)
    assert times[0] == 999 and bool((times == times.round()).all()) and bool((times[1:] < times[:-1]).all())
    s = 1 / (1 + VPSchedule().lambda_t(times))
    assert_close(s.diff(), torch.full((3,), float(1 - s[0]) / 4, dtype=torch.float64), atol=2e-3, rtol=0)
    with pytest.raises(ValueError, match="not for 3"):
        Reflow().inference_times(3)


def test_euler_pairs_divide_the_flow_time_whatever_the_schedule():
    torch.manual_seed(0)
    network, noise = MLP(VPSchedule(), "v"), noise_of(8, 3)
    times = uniform_flow_times(network.schedule, 5)
    wanted = sample(network, noise, times, NONE, solver=euler, final_t=network.schedule.clean_t)
    assert_close(TeacherSolver("euler", 5).solve(network, noise, NONE), wanted, rtol=0, atol=0)
    assert not torch.equal(TeacherSolver("ddim", 5).solve(network, noise, NONE), wanted)


def test_the_same_seed_gives_the_same_loss_and_the_teacher_gets_no_gradient():
    torch.manual_seed(0)
    student, teacher = MLP(VPSchedule(), "eps"), MLP(VPSchedule(), "eps")
    method = Reflow(solver=TeacherSolver("ddim", 3))
    losses = [
        method.losses(
            Networks(student, teacher, student), batch_of(4), step=0, generator=torch.Generator().manual_seed(1)
        ).terms["reflow"]
        for _ in range(2)
    ]
    assert_close(losses[0], losses[1], rtol=0, atol=0)
    losses[0].backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())


def test_noise_without_its_latent_is_refused():
    with pytest.raises(ValueError, match="noise"):
        DistillBatch(Condition(), Condition(), (2, 1, 1), noise=torch.zeros(1, 2, 1, 1))
