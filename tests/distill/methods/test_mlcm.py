"""MLCM's losses: known answers with exact denoisers, cost, gradients, phases."""

from __future__ import annotations

import pytest
import torch
from mlcm_tools import ExactJump, Linear, conditions

from distill.condition import Condition
from distill.denoiser import Denoiser
from distill.method import DistillBatch, Networks
from distill.methods.mlcm import MLCM, Progression, Refinement
from distill.methods.mlcm_states import GuidedTeacher, denoised_states
from distill.noise import gaussian_like
from distill.samplers import renoise_sample, sample
from distill.schedules import FlowSchedule, VPSchedule
from distill.toy import GaussianMixtureDenoiser

SHAPE = (2, 1, 1)
SCHEDULES = [(VPSchedule(), "eps"), (FlowSchedule(), "flow"), (FlowSchedule(shift=3.0), "flow")]


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch_of(size: int, null: Condition | None = None, **more) -> DistillBatch:
    return DistillBatch(conditions(size), Condition() if null is None else null, SHAPE, **more)


def gaussian(schedule, kind: str) -> GaussianMixtureDenoiser:
    means = torch.tensor([[0.8, -0.5]]).reshape(1, *SHAPE)
    return GaussianMixtureDenoiser(means, 0.5, schedule, prediction_type=kind)


@pytest.mark.parametrize(("schedule", "kind"), SCHEDULES)
@pytest.mark.parametrize("segments", [8, 2])
def test_loss_is_zero_for_the_exact_jump_only(schedule, kind, segments) -> None:
    teacher = gaussian(schedule, kind)
    method = MLCM(progression=Progression((segments,), (0,)), guidance_scale=1.0, schedule=schedule, teacher_steps=8)

    def loss(student) -> float:
        networks = Networks(student, teacher, student)
        return method.losses(networks, batch_of(256), step=0, generator=gen()).terms["consistency"].item()

    exact, plain, other = loss(ExactJump(teacher, segments)), loss(teacher), loss(ExactJump(teacher, segments * 2))
    assert exact < 1e-6
    assert plain > 20 * exact and other > 20 * exact


@pytest.mark.parametrize(("schedule", "kind"), SCHEDULES)
def test_second_stage_is_zero_for_the_exact_map_to_clean(schedule, kind) -> None:
    teacher = gaussian(schedule, kind)
    method = MLCM(refinement=Refinement(start=0, teacher_steps=40), guidance_scale=1.0, schedule=schedule)

    def loss(student) -> float:
        networks = Networks(student, teacher, student)
        output = method.losses(networks, batch_of(256), step=0, generator=gen())
        assert set(output.critic_inputs) == {"x_0", "generated"}
        return output.terms["consistency"].item()

    exact, plain = loss(ExactJump(teacher, 1)), loss(teacher)
    assert exact < 1e-4 and plain > 10 * exact


def test_exact_student_samples_the_data_in_every_number_of_steps() -> None:
    schedule = VPSchedule(rescale_betas_zero_snr=True)
    teacher = gaussian(schedule, "v")
    student, method = ExactJump(teacher, 1), MLCM(schedule=schedule)
    for count in method.step_counts:
        noise = torch.randn(3000, *SHAPE, generator=gen(count), dtype=torch.float64)
        times = method.inference_times(count)
        x_0 = renoise_sample(student, noise, times, Condition(), generator=gen(count + 50))
        assert torch.allclose(x_0.mean(0), teacher.means[0].double(), atol=0.04)
        assert torch.allclose(x_0.std(0), torch.full(SHAPE, 0.5, dtype=torch.float64), atol=0.03)


@pytest.mark.parametrize("time", [874.0, 499.0, 124.0])
def test_denoised_states_have_the_marginal_of_noised_data(time) -> None:
    schedule = VPSchedule(rescale_betas_zero_snr=True)
    means = torch.tensor([[1.5], [-0.5]], dtype=torch.float64)
    teacher = GaussianMixtureDenoiser(means, 0.3, schedule, weights=torch.tensor([0.7, 0.3]), prediction_type="v")
    size = 4000
    noise = torch.randn(size, 1, generator=gen(), dtype=torch.float64)
    guide = GuidedTeacher(teacher, 1.0, Condition(), Condition())
    t = torch.full((size,), time, dtype=torch.float64)
    states = denoised_states(guide, noise, t, torch.full((size,), 60))
    coef = schedule.coefficients(time)
    mean, variance = 0.7 * 1.5 - 0.3 * 0.5, 0.3**2 + 0.7 * 0.3 * 2.0**2  # of the data
    assert abs(float(states.mean() - coef.alpha * mean)) < 0.05
    assert abs(float(states.var() - (coef.alpha**2 * variance + coef.sigma**2))) < 0.06
    uniform = teacher.cdf(states, time).flatten().sort().values
    assert float((uniform - torch.linspace(0, 1, size, dtype=torch.float64)).abs().max()) < 0.03


@pytest.mark.parametrize("null_size", [1, 6])
@pytest.mark.parametrize(("schedule", "kind"), SCHEDULES)
def test_sorted_sub_batches_equal_one_sample_at_a_time(schedule, kind, null_size) -> None:
    teacher = Linear(schedule, kind)
    condition, null = conditions(6), Condition(embeds=torch.linspace(1, 2, null_size).reshape(-1, 1, 1))
    guide = GuidedTeacher(teacher, 8.0, condition, null)
    noise = torch.randn(6, *SHAPE, generator=gen())
    t = torch.tensor([40.0, 900.0, 300.0, 499.0, 998.0, 124.0], dtype=torch.float64)
    counts = torch.tensor([8, 1, 5, 4, 1, 7])
    found = denoised_states(guide, noise, t, counts)
    assert teacher.evaluated == 2 * int(counts.sum())  # nothing is computed in vain
    for i in range(6):
        one = GuidedTeacher(teacher, 8.0, condition[i : i + 1], null if null_size == 1 else null[i : i + 1])
        alone = denoised_states(one, noise[i : i + 1], t[i : i + 1], counts[i : i + 1])
        assert torch.allclose(found[i : i + 1], alone, atol=1e-4, rtol=1e-4)


def test_denoised_states_are_ddim_in_equal_steps() -> None:
    teacher = gaussian(FlowSchedule(), "flow")
    noise = torch.randn(3, *SHAPE, generator=gen())
    guide = GuidedTeacher(teacher, 1.0, Condition(), Condition())
    found = denoised_states(guide, noise, torch.full((3,), 400.0).double(), torch.full((3,), 3))
    wanted = sample(teacher, noise, torch.tensor([1000.0, 800.0, 600.0]), Condition(), final_t=400.0)
    assert torch.allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize("start", [5, 0])  # stage 1, stage 2
def test_gradients_reach_the_student_only_and_the_cost_is_as_counted(start) -> None:
    student, teacher, target = (Linear(VPSchedule(), start=value) for value in (0.6, 0.7, 0.8))
    size = 16
    method = MLCM(refinement=Refinement(start=start), guidance_scale=8.0)
    batch = batch_of(size, Condition(embeds=torch.zeros(1, 1, 1)))
    output = method.losses(Networks(student, teacher, target), batch, step=0, generator=gen())
    output.terms["consistency"].backward()
    assert student.w.grad is not None and student.w.grad.abs() > 0
    assert teacher.w.grad is None and target.w.grad is None
    if start:  # guided: 4.5 evaluations to the state on average and one move
        assert teacher.evaluated == size * 2 * 4.5 + size * 2
        assert student.evaluated == size and 0.7 * size <= target.evaluated <= size
    else:  # p = 3, q = 4; the lowest of 8 milestones moves to the clean end, where nothing is left to predict
        assert teacher.evaluated == size * 2 * 3
        assert student.evaluated == size * 5 and target.evaluated == size * 7 // 8


def test_same_generator_same_loss_and_other_groupings_and_states_work() -> None:
    networks = Networks(*(Linear(VPSchedule(), start=value) for value in (0.6, 0.7, 0.8)))
    x_0 = torch.randn(8, *SHAPE, generator=gen(9))
    for options in ({}, {"grouping": "batch"}, {"states": "noised"}, {"distance": "pseudo_huber"}):
        method = MLCM(guidance_scale=1.0, **options)
        assert method.needs_latents == (options == {"states": "noised"}) and not method.needs_null
        first, again, other = (
            method.losses(networks, batch_of(8, x_0=x_0), step=0, generator=gen(seed)).terms["consistency"]
            for seed in (1, 1, 2)
        )
        assert torch.equal(first, again) and not torch.equal(first, other)


def test_progression_and_stages_switch_at_their_steps() -> None:
    method = MLCM(progression=Progression((8, 4, 2), (0, 10, 20)), refinement=Refinement(start=30, num_segments=8))
    assert [method.num_segments(step) for step in (0, 9, 10, 19, 20, 29, 30, 99)] == [8, 8, 4, 4, 2, 2, 8, 8]
    assert not method.in_refinement(29) and method.in_refinement(30)
    teacher = gaussian(VPSchedule(), "eps")
    exact = Networks(ExactJump(teacher, 4), teacher, ExactJump(teacher, 4))
    with pytest.raises(ValueError, match=r"begin at steps \[10, 20\], where the second stage"):
        MLCM(progression=Progression((8, 4, 2), (0, 10, 20)), refinement=Refinement(start=10))
    method = MLCM(progression=Progression((8, 4), (0, 10)), guidance_scale=1.0, teacher_steps=8)
    early, late = (
        method.losses(exact, batch_of(64), step=step, generator=gen()).terms["consistency"] for step in (9, 10)
    )
    assert late < 1e-6 and early > 100 * late


def test_mistakes_are_told() -> None:
    networks = Networks(*(Linear(VPSchedule()) for _ in range(3)))
    with pytest.raises(ValueError, match="null condition"):
        MLCM(guidance_scale=8.0).losses(networks, batch_of(4), step=0, generator=gen())
    with pytest.raises(ValueError, match="clean latents"):
        MLCM(guidance_scale=1.0, states="noised").losses(networks, batch_of(4), step=0, generator=gen())
    with pytest.raises(ValueError, match="another clock"):
        MLCM(guidance_scale=1.0, schedule=FlowSchedule()).losses(networks, batch_of(4), step=0, generator=gen())
    with pytest.raises(ValueError, match=r"\(0, 5\)"):
        Progression((8, 4, 2), (0, 5))
    with pytest.raises(ValueError, match="'real'"):
        MLCM(states="real")  # type: ignore[arg-type]


def test_training_brings_the_student_to_the_exact_jump() -> None:
    """A few hundred steps on a Gaussian: the learnt jump beats the teacher's own single step by far."""
    teacher = gaussian(VPSchedule(), "eps")
    student = Affine(VPSchedule(), 2)
    method = MLCM(progression=Progression((2,), (0,)), guidance_scale=1.0, teacher_steps=2, skip=60)
    optimizer = torch.optim.Adam(student.parameters(), lr=2e-2)
    networks = Networks(student, teacher, student)
    for step in range(200):
        loss = method.losses(networks, batch_of(128), step=step, generator=gen(step)).terms["consistency"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    @torch.no_grad()
    def error(network) -> float:
        noise = gaussian_like(torch.empty(512, *SHAPE), gen(77))
        x = noise
        for t, s in ((999.0, 499.0), (499.0, -1.0)):
            p = network.predict(x, t, Condition())
            coef = VPSchedule().coefficients(s)
            x = coef.alpha * p.x_0 + coef.sigma * p.eps
        return float((x - teacher.transport(noise, 999.0, -1.0)).square().mean())

    assert error(student) < 0.5 * error(teacher)


class Affine(Denoiser):
    """x_0 affine in x_t, coefficients free at 41 knots of time: holds the exact jump up to interpolation."""

    def __init__(self, schedule, channels: int) -> None:
        super().__init__(schedule, "x0")
        self.gain = torch.nn.Parameter(torch.full((41,), 0.5))
        self.offset = torch.nn.Parameter(torch.zeros(41, channels))

    def forward(self, x_t, t, condition):
        place = (t.float() + 1) / 25
        low = place.floor().long().clamp(0, 39)
        part = (place - low).reshape(-1, 1)
        gain = torch.lerp(self.gain[low][:, None], self.gain[low + 1][:, None], part)
        offset = torch.lerp(self.offset[low], self.offset[low + 1], part)
        return gain[..., None, None] * x_t + offset[..., None, None]
