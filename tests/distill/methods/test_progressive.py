"""Two steps in one: targets are exact, phases switch and resume, the linear case is solved."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from distill.condition import Condition
from distill.denoiser import Denoiser, Prediction
from distill.method import DistillBatch, Networks
from distill.methods.progressive import ProgressiveDistillation, noisy_state, snr_weight, two_step_target
from distill.samplers import sample
from distill.schedules import FlowSchedule, VPSchedule
from distill.solvers import ddim_step
from distill.timesteps import timesteps
from distill.toy import GaussianMixtureDenoiser

NONE = Condition()
SHAPE = (1, 1, 1)


class Linear(Denoiser):
    """For every whole time its own affine map from x_t to x_0."""

    def __init__(self, schedule=None) -> None:
        super().__init__(schedule or VPSchedule(), "x0")
        self.gain = nn.Parameter(torch.zeros(1001, dtype=torch.float64))
        self.bias = nn.Parameter(torch.zeros(1001, dtype=torch.float64))

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        index = t.long()
        return self.gain[index, None, None, None] * x_t + self.bias[index, None, None, None]


def gaussian(schedule=None) -> GaussianMixtureDenoiser:
    mean = torch.full((1, *SHAPE), 0.8, dtype=torch.float64)
    return GaussianMixtureDenoiser(mean, 0.5, schedule or VPSchedule())


def data(size: int, seed: int) -> DistillBatch:
    x_0 = gaussian().draw(size, torch.Generator().manual_seed(seed))
    return DistillBatch(NONE, NONE, SHAPE, x_0=x_0)


@pytest.mark.parametrize("schedule", [VPSchedule(), FlowSchedule()])
@pytest.mark.parametrize("times", [(900.0, 700.0, 450.0), (400.0, 200.0, None)])
def test_one_step_with_the_target_arrives_where_the_teachers_two_arrive(rand64, schedule, times):
    end = schedule.clean_t if times[2] is None else times[2]
    t, middle, s = (torch.full((5,), time, dtype=torch.float64) for time in (times[0], times[1], end))
    teacher = GaussianMixtureDenoiser(rand64(3, 2), 0.3, schedule)
    x_t = rand64(5, 2)
    x_0 = two_step_target(teacher, x_t, t, middle, s, NONE)
    coef_t, coef_s = schedule.coefficients(t), schedule.coefficients(s)
    eps = (x_t - coef_t.alpha[:, None] * x_0) / coef_t.sigma[:, None]
    wanted = sample(teacher, x_t, torch.stack([t[0], middle[0]]), NONE, final_t=end)
    assert_close(ddim_step(x_t, Prediction(x_0, eps), coef_t, coef_s), wanted)


def test_halving_a_linear_teacher_down_to_one_step_keeps_its_trajectories():
    """Affine students are exact for one Gaussian, so 8 teacher steps and one student step end in the same place."""
    teacher, student = gaussian(), Linear()
    method = ProgressiveDistillation(student_steps=(4, 2, 1), steps_per_phase=1)
    noise = torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for phase, num_steps in enumerate(method.student_steps):
        # solve the phase in closed form: a line through what the teacher makes of two states at each time
        grid = torch.cat([timesteps(student.schedule, 2 * num_steps, "trailing"), torch.tensor([-1.0])]).double()
        method.losses(
            Networks(student, teacher, student), data(4, phase), step=phase, generator=torch.Generator().manual_seed(0)
        )  # takes the copy
        frozen = teacher if phase == 0 else _student_of(method, student)
        gain, bias = student.gain.detach().clone(), student.bias.detach().clone()
        for j in range(num_steps):
            t, middle, s = (grid[2 * j + k].expand(2) for k in range(3))
            x_t = torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(2, *SHAPE)
            with torch.no_grad():
                low, high = two_step_target(frozen, x_t, t, middle, s, NONE).flatten()
            gain[int(t[0])], bias[int(t[0])] = high - low, low
        with torch.no_grad():
            student.gain.copy_(gain)
            student.bias.copy_(bias)
        loss = method.losses(
            Networks(student, teacher, student), data(64, 9), step=phase, generator=torch.Generator().manual_seed(2)
        ).terms["progressive"]
        assert loss.item() < 1e-20
    many = sample(teacher, noise, timesteps(teacher.schedule, 8, "trailing"), NONE)
    with torch.no_grad():
        one = sample(student, noise, method.inference_times(1), NONE)
    assert_close(one, many)


def _student_of(method: ProgressiveDistillation, student: Linear) -> Linear:
    copy = Linear()
    copy.load_state_dict(method.snapshot.tensors())
    return copy


def test_training_by_gradient_learns_the_halved_steps():
    teacher, student = gaussian(), Linear()
    method = ProgressiveDistillation(student_steps=(2, 1), steps_per_phase=200)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.03)
    for step in range(400):
        loss = method.losses(
            Networks(student, teacher, student),
            data(32, step),
            step=step,
            generator=torch.Generator().manual_seed(step),
        ).terms["progressive"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    noise = torch.randn(256, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        one = sample(student, noise, method.inference_times(1), NONE)
    many = sample(teacher, noise, timesteps(teacher.schedule, 4, "trailing"), NONE)
    assert float((one - many).square().mean()) < 1e-3 * float(many.var())


def test_the_copy_is_of_the_phases_first_step_and_survives_saving():
    teacher, student = gaussian(), Linear()
    method = ProgressiveDistillation(student_steps=(2, 1), steps_per_phase=2)
    networks = Networks(student, teacher, student)

    def loss(m: ProgressiveDistillation, step: int) -> Tensor:
        return m.losses(networks, data(8, 0), step=step, generator=torch.Generator().manual_seed(0)).terms[
            "progressive"
        ]

    loss(method, 0)
    assert method.snapshot.taken_in == -1 and not method.snapshot.tensors()
    with torch.no_grad():
        student.gain.fill_(0.3)
    loss(method, 2)
    assert method.snapshot.taken_in == 1
    with torch.no_grad():
        student.gain.fill_(0.9)
    after = loss(method, 3)
    assert float(method.snapshot.tensors()["gain"][0]) == pytest.approx(0.3)
    resumed = ProgressiveDistillation(student_steps=(2, 1), steps_per_phase=2)
    resumed.load_state_dict(method.state_dict())
    assert_close(loss(resumed, 3), after, rtol=0, atol=0)
    assert float(resumed.snapshot.tensors()["gain"][0]) == pytest.approx(0.3)


def test_room_for_the_copy_can_be_made_before_the_first_step():
    student = Linear()
    method = ProgressiveDistillation(student_steps=(2, 1))
    method.prepare(Networks(student, gaussian(), student))
    assert {"snapshot.phase", "snapshot.gain", "snapshot.bias"} == set(method.state_dict())
    assert method.snapshot.taken_in == -1


def test_a_copy_that_was_lost_is_an_error_and_not_another_teacher():
    student = Linear()
    method = ProgressiveDistillation(student_steps=(2, 1), steps_per_phase=1)
    method.load_state_dict({"snapshot.phase": torch.tensor(1)})
    with pytest.raises(ValueError, match="not in the checkpoint"):
        method.losses(Networks(student, student, student), data(2, 0), step=1, generator=torch.Generator())


def test_the_teacher_of_a_later_phase_is_the_adapter_as_it_was_at_its_start():
    from distill.adapters import LoraSettings, networks_for

    class Dense(Denoiser):
        def __init__(self) -> None:
            super().__init__(VPSchedule(), "x0")
            self.to_q = nn.Linear(1, 1)

        def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            return self.to_q(x_t)

    networks = networks_for(Dense(), LoraSettings(rank=1, targets=("to_q",)))
    method = ProgressiveDistillation(student_steps=(2, 1), steps_per_phase=1)
    batch = DistillBatch(NONE, NONE, SHAPE, x_0=torch.zeros(4, *SHAPE))

    def loss() -> float:
        return (
            method.losses(networks, batch, step=1, generator=torch.Generator().manual_seed(0)).terms["progressive"]
        ).item()

    first = loss()
    kept = {name for name in method.snapshot.tensors() if "lora" in name}
    assert kept and kept == set(method.snapshot.tensors())
    assert loss() == first
    with torch.no_grad():
        for parameter in networks.student.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    assert loss() != first  # the student moved, the teacher did not
    x = torch.ones(1, *SHAPE)
    before = networks.teacher(x, torch.zeros(1), NONE)
    from distill.methods.progressive import _AsOf

    assert_close(_AsOf(networks.student, method.snapshot.tensors())(x, torch.zeros(1), NONE), before)  # B was zero


def test_phases_follow_one_another():
    method = ProgressiveDistillation(student_steps=(4, 2, 1), steps_per_phase=10, guidance_phase=5)
    assert [method.phase_at(step) for step in (0, 4, 5, 14, 15, 25, 1000)] == [-1, -1, 0, 0, 1, 2, 2]
    assert method.step_counts == (1,)


def test_the_guidance_phase_regresses_the_guided_prediction():
    class Pulled(Linear):
        def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            assert condition.pooled is not None
            return super().forward(x_t, t, condition) + condition.pooled.reshape(-1, 1, 1, 1).to(x_t)

    teacher, student = Pulled(), Pulled()
    with torch.no_grad():
        student.bias.fill_(2.0)  # guided: null + 3 (condition - null) = 0 + 3 x 1; the student's own: 1 + 2
    method = ProgressiveDistillation(guidance_scale=3.0, guidance_phase=1, weighting="constant")
    x_0 = torch.zeros(4, *SHAPE, dtype=torch.float64)
    batch = DistillBatch(Condition(pooled=torch.ones(4, 1)), Condition(pooled=torch.zeros(1, 1)), SHAPE, x_0=x_0)
    loss = method.losses(
        Networks(student, teacher, student), batch, step=0, generator=torch.Generator().manual_seed(0)
    ).terms["progressive"]
    assert loss.item() == pytest.approx(0.0, abs=1e-20)


def test_states_at_the_noisiest_time_hold_no_signal(rand64):
    x_0, noise = rand64(2, *SHAPE), rand64(2, *SHAPE)
    t = torch.tensor([999.0, 500.0], dtype=torch.float64)
    x_t = noisy_state(VPSchedule(), x_0, noise, t)
    assert_close(x_t[0], noise[0], rtol=0, atol=0)
    assert_close(x_t[1], VPSchedule().add_noise(x_0, noise, t)[1])


def test_weights_are_the_papers():
    coef = VPSchedule().coefficients(torch.tensor([10.0, 900.0]))
    snr = coef.alpha**2 / coef.sigma**2
    assert_close(snr_weight(coef, "truncated_snr"), torch.stack([snr[0], torch.ones_like(snr[1])]))
    assert_close(snr_weight(coef, "snr_plus_one"), snr + 1)


@pytest.mark.parametrize("steps", [(), (4, 3), (2, 4), (0,)])
def test_numbers_that_do_not_halve_are_refused(steps):
    with pytest.raises(ValueError, match="halve"):
        ProgressiveDistillation(student_steps=steps)


def test_latents_are_needed():
    teacher = gaussian()
    with pytest.raises(ValueError, match="x_0"):
        ProgressiveDistillation().losses(
            Networks(teacher, teacher, teacher),
            DistillBatch(Condition(pooled=torch.zeros(1, 1)), NONE, SHAPE),
            step=0,
            generator=torch.Generator(),
        )


def test_guidance_is_learnt_at_all_times_that_the_first_phase_asks_it_at():
    method = ProgressiveDistillation(student_steps=(4, 2, 1), guidance_phase=1)
    x_0 = torch.zeros(256, *SHAPE)
    learnt, generator = (
        method._times(VPSchedule(), 4, x_0, torch.Generator().manual_seed(0), every=True)[0],
        torch.Generator(),
    )
    t, middle, s = method._times(VPSchedule(), 4, x_0, generator.manual_seed(0), every=False)
    assert set(learnt.tolist()) == set(t.tolist()) | set(middle.tolist())
    assert set(s.tolist()) == (set(t.tolist()) - {999.0}) | {VPSchedule().clean_t}
