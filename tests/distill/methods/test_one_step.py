"""One-step distillation: what is compared, when the phase changes, where gradients go."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from distill.condition import Condition
from distill.denoiser import Denoiser
from distill.held import held_modules
from distill.method import DistillBatch, Networks
from distill.methods.image_space import ImageSpace
from distill.methods.one_step import OneStepDistillation, one_step
from distill.methods.pairs import TeacherSolver
from distill.schedules import FlowSchedule, VPSchedule
from distill.toy import GaussianMixtureDenoiser

SHAPE = (2, 4, 4)


class Conv(Denoiser):
    """One convolution, whatever the time."""

    def __init__(self, schedule, prediction_type: str = "eps") -> None:
        super().__init__(schedule, prediction_type)
        self.net = nn.Conv2d(2, 2, 1)
        self.asked: list[float] = []

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.asked += t.tolist()
        return self.net(x_t)


class Doubling(nn.Module):
    """A decoder whose images are twice the latents."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(2.0))

    def decode(self, latents: Tensor) -> Tensor:
        return self.gain * latents


class Absolute(nn.Module):
    """A distance."""

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        return (images - targets).abs().mean()


def batch(size: int = 3) -> DistillBatch:
    draw = torch.Generator().manual_seed(5)
    x_0, noise = torch.randn(size, *SHAPE, generator=draw), torch.randn(size, *SHAPE, generator=draw)
    return DistillBatch(Condition(), Condition(), SHAPE, x_0=x_0, noise=noise)


def losses(method: OneStepDistillation, student: Denoiser, *, step: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return method.losses(Networks(student, student, student), batch(), step=step, generator=generator).terms


def test_on_a_flow_one_step_adds_the_velocity_to_the_noise():
    student = Conv(FlowSchedule(), "flow")
    noise = batch().noise
    assert_close(one_step(student, noise, batch()), noise - student.net(noise))  # the network puts out eps - x_0
    assert student.asked == [1000.0] * 3


def test_l2_then_perceptual_at_the_given_step():
    student = Conv(VPSchedule())
    method = OneStepDistillation(perceptual=Absolute(), decoder=Doubling(), perceptual_start=2)
    x_0, target = one_step(student, batch().noise, batch()), batch().x_0
    assert_close(losses(method, student, step=1), {"l2": (x_0 - target).square().mean()})
    assert_close(losses(method, student, step=2), {"perceptual": 2 * (x_0 - target).abs().mean()})


def test_the_exact_reading_asks_at_the_schedules_end_and_the_other_at_1000():
    for reading, clock in (("exact", 999.0), ("reinterpret", 1000.0)):
        student = Conv(VPSchedule())
        method = OneStepDistillation(reading=reading)
        losses(method, student)
        assert set(student.asked) == {clock}
        assert method.inference_times(1).tolist() == [clock]


def test_a_crop_shows_both_the_same_square():
    latents = torch.arange(16.0).reshape(4, 4).expand(2, 2, 4, 4)
    one, other = ImageSpace(Doubling(), crop=2)(latents, latents, generator=torch.Generator().manual_seed(1))
    assert one.shape == (2, 2, 2, 2)
    assert_close(one, other)
    assert float(one[0, 0, 1, 1] - one[0, 0, 0, 0]) == 2 * 5


def test_held_parts_are_frozen_and_neither_saved_nor_trained():
    method = OneStepDistillation(perceptual=Absolute(), decoder=Doubling())
    method.train()
    assert not method.state_dict() and not list(method.parameters())
    assert {type(part) for part in held_modules(method)} == {Absolute, Doubling}
    assert not any(part.training or any(p.requires_grad for p in part.parameters()) for part in held_modules(method))


def test_gradients_pass_the_decoder_into_the_student_only():
    student, teacher = Conv(VPSchedule()), Conv(VPSchedule())
    decoder = Doubling()
    method = OneStepDistillation(perceptual=Absolute(), decoder=decoder, l2_after=0.5)
    terms = method.losses(
        Networks(student, teacher, student), batch(), step=0, generator=torch.Generator().manual_seed(0)
    ).terms
    torch.stack(list(terms.values())).sum().backward()
    assert student.net.weight.grad is not None and bool(student.net.weight.grad.abs().sum() > 0)
    assert teacher.net.weight.grad is None and decoder.gain.grad is None


def test_distilling_a_single_gaussian_finds_the_exact_one_step_map():
    mean = torch.full((1, *SHAPE), 0.7)
    teacher = GaussianMixtureDenoiser(mean, 0.2, FlowSchedule(), prediction_type="flow")
    student = Conv(FlowSchedule(), "flow")
    method = OneStepDistillation(solver=TeacherSolver("euler", num_steps=100))
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
    for step in range(150):
        given = DistillBatch(Condition(pooled=torch.zeros(8, 1)), Condition(), SHAPE)
        generator = torch.Generator().manual_seed(step)
        loss = method.losses(Networks(student, teacher, student), given, step=step, generator=generator).terms["l2"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 0:
            first = loss.item()
    assert loss.item() < 1e-3 * first


def test_only_one_step_is_known():
    with pytest.raises(ValueError, match="1 step"):
        OneStepDistillation().inference_times(2)
    with pytest.raises(ValueError, match="decoder"):
        OneStepDistillation(decoder=Doubling())
    with pytest.raises(ValueError, match="decode"):
        OneStepDistillation(perceptual=Absolute(), decoder=nn.Linear(1, 1))
