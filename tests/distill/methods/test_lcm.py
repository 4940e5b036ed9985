from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler
from torch import nn
from torch.testing import assert_close

from distill.condition import Condition
from distill.denoiser import Denoiser
from distill.method import DistillBatch, Networks
from distill.methods.consistency import draw_pair
from distill.methods.lcm import LCM
from distill.noise import gaussian_like
from distill.samplers import lcm_boundary, renoise_sample
from distill.schedules import FlowSchedule, VPSchedule
from distill.toy import GaussianMixtureDenoiser

VP, FLOW = VPSchedule(), FlowSchedule()


class Affine(Denoiser):
    """``weight x_t + bias + mean of the text``: small, trainable, sensitive to text, time and scale."""

    def __init__(self, schedule=VP, prediction="eps", weight: float = 0.8) -> None:
        super().__init__(schedule, prediction)
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))
        self.guidance_seen: torch.Tensor | None = None

    def forward(self, x_t, t, condition):
        self.guidance_seen = condition.guidance
        text = condition.embeds.mean((1, 2))[:, None, None, None]
        return self.weight * x_t + text + 1e-4 * t[:, None, None, None]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_batch(rand64, size: int = 3) -> DistillBatch:
    null = Condition(embeds=torch.zeros(1, 2, 4).double())
    return DistillBatch(Condition(embeds=rand64(size, 2, 4)), null, (4, 2, 2), rand64(size, 4, 2, 2))


def script_loss(networks, batch, prediction, generator, guidance_range):
    """The arithmetic of diffusers' consistency-distillation scripts, on their float64 numpy tables."""
    abar = VP.alphas_cumprod.numpy()
    steps = (np.arange(1, 51) * 20).round().astype(np.int64) - 1
    abar_prev = np.asarray([abar[0], *abar[steps[:-1]]])
    # the draws, in our order
    t, _ = draw_pair(VP, 3, generator, num_points=50, skip=20.0)
    low, high = guidance_range
    w = (low + (high - low) * torch.rand(3, generator=generator) - 1.0).double().reshape(-1, 1, 1, 1)
    noise = gaussian_like(batch.x_0, generator)
    index = ((t.long() + 1) // 20 - 1).numpy()

    def column(values):
        return torch.as_tensor(values).double().reshape(-1, 1, 1, 1)

    alpha, sigma = column(abar[t.long().numpy()]).sqrt(), column(1 - abar[t.long().numpy()]).sqrt()

    def read(output, z, alpha, sigma):
        if prediction == "v":
            return alpha * z - sigma * output, alpha * output + sigma * z
        return (z - sigma * output) / alpha, output

    def boundary(time):
        scaled = 10 * column(time)
        return 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()

    z = alpha * batch.x_0 + sigma * noise
    c_skip, c_out = boundary(t)
    found = c_skip * z + c_out * read(networks.student(z, t, batch.condition), z, alpha, sigma)[0]
    with torch.no_grad():
        x_0_c, eps_c = read(networks.teacher(z, t, batch.condition), z, alpha, sigma)
        x_0_u, eps_u = read(networks.teacher(z, t, batch.null.expand(3)), z, alpha, sigma)
        x_0, eps = x_0_c + w * (x_0_c - x_0_u), eps_c + w * (eps_c - eps_u)
        prev = column(abar_prev[index])
        z_prev = prev.sqrt() * x_0 + (1.0 - prev).sqrt() * eps
        s = (t - 20).clamp(min=0)
        at_s = column(abar[s.long().numpy()])
        output = networks.target(z_prev, s, batch.condition)
        c_skip, c_out = boundary(s)
        wanted = c_skip * z_prev + c_out * read(output, z_prev, at_s.sqrt(), (1 - at_s).sqrt())[0]
    return ((found - wanted) ** 2 + 0.001**2).sqrt().sub(0.001).mean()


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_loss_equals_the_published_scripts(prediction, rand64):
    networks = Networks(*(Affine(prediction=prediction, weight=w) for w in (0.8, 0.9, 0.85)))
    batch = make_batch(rand64)
    for seed in range(3):
        found = LCM().losses(networks, batch, step=0, generator=seeded(seed)).terms["consistency"]
        assert_close(found, script_loss(networks, batch, prediction, seeded(seed), (3.0, 15.0)), rtol=1e-5, atol=1e-7)


def test_a_whole_sampling_run_equals_diffusers(rand64):
    theirs = LCMScheduler(beta_start=0.00085, beta_end=0.012)
    theirs.alphas_cumprod = VP.alphas_cumprod
    student, condition, x_T = Affine(), Condition(embeds=rand64(2, 2, 4)), rand64(2, 4, 2, 2)
    with torch.no_grad():
        times = LCM().inference_times(4)
        found = renoise_sample(student, x_T, times, condition, generator=seeded(), boundary=lcm_boundary)
        theirs.set_timesteps(4)
        x, generator = x_T, seeded()
        for t in theirs.timesteps:
            x = theirs.step(student(x, t.expand(2), condition), t, x, generator=generator).prev_sample
    assert_close(found, x, rtol=1e-5, atol=1e-5)


def test_gradient_reaches_the_student_only(rand64):
    networks = Networks(Affine(), Affine(weight=0.9), Affine(weight=0.7))
    LCM().losses(networks, make_batch(rand64), step=0, generator=seeded()).terms["consistency"].backward()
    assert networks.student.weight.grad.abs() > 0
    assert networks.teacher.weight.grad is None and networks.target.weight.grad is None
    own = Networks(student := Affine(), Affine(weight=0.9), student)
    LCM(target_decay=None).losses(own, make_batch(rand64), step=0, generator=seeded()).terms["consistency"].backward()
    assert student.weight.grad.isfinite()


@pytest.mark.parametrize("schedule", [VP, FLOW, FlowSchedule(shift=3.0)], ids=["vp", "flow", "shifted"])
def test_a_perfect_consistency_function_has_no_loss_and_another_has(schedule, rand64):
    # All data in one point: the teacher's trajectories are straight lines to it, so predicting it is consistent.
    point = rand64(1, 2, 2, 2)
    exact = GaussianMixtureDenoiser(point, 1e-6, schedule, prediction_type="v" if schedule is VP else "flow")
    wrong = GaussianMixtureDenoiser(point + 1.0, 1e-6, schedule, prediction_type="v")
    method = LCM(guidance_range=(1.0, 1.0), schedule=schedule)
    assert not method.needs_null
    batch = DistillBatch(Condition(), Condition(), (2, 2, 2), point.expand(64, -1, -1, -1))
    perfect = method.losses(Networks(exact, exact, exact), batch, step=0, generator=seeded()).terms["consistency"]
    # Time 0 of Stable Diffusion's table still holds sigma = 0.03, which LCM's boundary takes for clean.
    assert perfect.item() < (2e-3 if schedule is VP else 1e-4)
    off = method.losses(Networks(wrong, exact, exact), batch, step=0, generator=seeded()).terms["consistency"]
    assert off.item() > 0.9


@pytest.mark.parametrize("schedule", [VP, FLOW], ids=["vp", "flow"])
def test_one_parameter_finds_the_data(schedule):
    # A student that predicts one constant learns the only consistent one, the data's point.
    class Constant(Denoiser):
        def __init__(self) -> None:
            super().__init__(schedule, "x0")
            self.value = nn.Parameter(torch.zeros(1).double())

        def forward(self, x_t, t, condition):
            return self.value.expand_as(x_t)

    point = torch.full((1, 1, 1, 1), 1.5).double()
    student, teacher = Constant(), GaussianMixtureDenoiser(point, 0.01, schedule, prediction_type="v")
    method = LCM(guidance_range=(1.0, 1.0), distance="l2", target_decay=None, schedule=schedule)
    batch = DistillBatch(Condition(), Condition(), (1, 1, 1), point.expand(64, 1, 1, 1))
    optimizer, generator = torch.optim.Adam([student.value], lr=0.1), seeded()
    networks = Networks(student, teacher, student)
    for step in range(150):
        optimizer.zero_grad()
        method.losses(networks, batch, step=step, generator=generator).terms["consistency"].backward()
        optimizer.step()
    assert student.value.item() == pytest.approx(1.5, abs=0.1)


def test_the_scale_is_told_to_student_and_target_but_not_to_the_teacher(rand64):
    networks, batch = Networks(Affine(), Affine(), Affine()), make_batch(rand64)
    LCM(condition_on_guidance=True).losses(networks, batch, step=0, generator=seeded())
    told = networks.student.guidance_seen
    assert told.shape == (3,) and told.min() >= 3.0 and told.max() <= 15.0
    assert torch.equal(networks.target.guidance_seen, told)
    assert networks.teacher.guidance_seen is None
    LCM().losses(networks, batch, step=0, generator=seeded())
    assert networks.student.guidance_seen is None


def test_a_seed_decides_the_loss(rand64):
    networks, batch = Networks(Affine(), Affine(weight=0.9), Affine(weight=0.7)), make_batch(rand64)

    def value(seed: int) -> float:
        return LCM().losses(networks, batch, step=0, generator=seeded(seed)).terms["consistency"].item()

    assert value(0) == value(0) != value(1)


def test_refuses_what_it_cannot_train(rand64):
    networks, batch = Networks(Affine(), Affine(), Affine()), make_batch(rand64)
    with pytest.raises(ValueError, match="LCM is trained on latents"):
        LCM().losses(networks, DistillBatch(batch.condition, batch.null, (4, 2, 2)), step=0, generator=seeded())
    with pytest.raises(ValueError, match="null condition"):
        unguided = DistillBatch(batch.condition, Condition(), (4, 2, 2), batch.x_0)
        LCM().losses(networks, unguided, step=0, generator=seeded())
    with pytest.raises(ValueError, match=r"schedule=student\.schedule"):
        LCM(schedule=FLOW).losses(networks, batch, step=0, generator=seeded())
    with pytest.raises(ValueError, match="not 9"):
        LCM().inference_times(9)


class Oracle(Denoiser):
    """Knows the clean latents of the batch."""

    def __init__(self, x_0: torch.Tensor) -> None:
        super().__init__(VP, "x0")
        self.x_0 = x_0

    def forward(self, x_t, t, condition):
        return self.x_0


def test_without_a_teacher_the_data_say_where_the_trajectory_goes(rand64):
    batch = make_batch(rand64)
    student, target = Affine(), Affine(weight=0.7)

    def loss(teacher, **settings):
        method = LCM(guidance_range=(1.0, 1.0), **settings)
        return method.losses(Networks(student, teacher, target), batch, step=0, generator=seeded()).terms["consistency"]

    class Absent(Affine):
        def forward(self, x_t, t, condition):
            raise AssertionError("the teacher was asked")

    alone = loss(Absent(), with_teacher=False)
    assert_close(alone, loss(Oracle(batch.x_0)))
    assert not torch.isclose(alone, loss(Affine(weight=0.9)))
    assert not LCM(with_teacher=False).needs_null  # whatever the guidance
