"""Preference, distribution matching and the adversarial option: directions, formulas, who gets gradients."""

from __future__ import annotations

import pytest
import torch
from mlcm_tools import Linear, conditions
from torch import nn

from distill.condition import Condition
from distill.method import DistillBatch, Networks
from distill.methods.adversarial import Adversarial
from distill.methods.discriminator import Discriminator
from distill.methods.distribution_matching import DistributionMatching, distribution_matching_gradient
from distill.methods.extra_terms import StudentOutput
from distill.methods.mlcm import MLCM, Refinement
from distill.methods.preference import PreferenceTerm
from distill.schedules import VPSchedule
from distill.toy import GaussianMixtureDenoiser

SHAPE = (2, 4, 4)


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch_of(size: int, **more) -> DistillBatch:
    return DistillBatch(conditions(size), Condition(embeds=torch.zeros(1, 1, 1)), SHAPE, **more)


def networks() -> Networks:
    return Networks(*(Linear(VPSchedule(), start=value) for value in (0.6, 0.7, 0.6)))


class FunctionScorer:
    def __init__(self, function) -> None:
        self.score = function


def closeness(x_0, condition):
    """A scorer: 20 minus the squared distance from the number that the condition names."""
    return 20 - (x_0 - condition.embeds.reshape(-1, 1, 1, 1)).square().flatten(1).mean(1)


class TinyFeatures(nn.Module):
    widths = (4,)
    is_checkpointed = False
    schedule = VPSchedule()

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)

    def forward(self, x_t, t, condition):
        return (self.conv(x_t),)


def test_preference_is_the_published_margin_loss() -> None:
    def score(x_0, condition):
        return condition.embeds.reshape(-1) + x_0.mean((1, 2, 3))

    batch = DistillBatch(Condition(embeds=torch.tensor([20.0, -3.0]).reshape(2, 1, 1)), Condition(), SHAPE)
    output = StudentOutput(torch.zeros(2, *SHAPE), None)
    loss = PreferenceTerm(FunctionScorer(score), weight=1.0).student_loss(
        output, networks(), batch, step=0, generator=gen()
    )
    # Own scores 20 and -3 against 16: 0 and 19. The other's, -3 and 20, against 0: 0 and 20.
    assert loss.item() == pytest.approx((0 + 19 + 0 + 20) / 2)


def test_preference_raises_the_score_of_a_toy_student() -> None:
    student, batch = nn.Parameter(torch.randn(4, *SHAPE, generator=gen())), batch_of(4)
    term = PreferenceTerm(FunctionScorer(closeness), weight=1.0, positive_margin=20.0, negative_margin=19.9)
    optimizer = torch.optim.SGD([student], lr=2.0)
    before = closeness(student, batch.condition).mean().item()
    for step in range(20):
        output = StudentOutput(student, None)
        loss = term.student_loss(output, networks(), batch, step=step, generator=gen(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert closeness(student, batch.condition).mean().item() > before + 0.5


def test_distribution_matching_moves_samples_towards_the_teacher() -> None:
    schedule = VPSchedule()
    teacher = GaussianMixtureDenoiser(torch.tensor([[2.0], [3.0]]).reshape(2, 1, 1, 1), 0.5, schedule)
    fake = GaussianMixtureDenoiser(torch.tensor([[-1.0]]).reshape(1, 1, 1, 1), 0.5, schedule)
    x_0 = (torch.randn(256, 1, 1, 1, generator=gen()) * 0.5 - 1.0).requires_grad_()
    batch = DistillBatch(conditions(256), Condition(), (1, 1, 1))
    term = DistributionMatching(fake, guidance_scale=1.0)
    kept = Networks(teacher, teacher, teacher)
    term.student_loss(StudentOutput(x_0, None), kept, batch, step=0, generator=gen()).backward()
    assert x_0.grad is not None
    assert float((x_0.grad < 0).float().mean()) > 0.95  # descent goes up, to the teacher's modes
    same = DistributionMatching(teacher, guidance_scale=1.0)
    x_0.grad = None
    same.student_loss(StudentOutput(x_0, None), kept, batch, step=0, generator=gen()).backward()
    assert float(x_0.grad.abs().max()) == 0.0  # where the distributions agree there is nothing to do


def test_distribution_matching_gradient_is_dmd2s() -> None:
    x, real, fake = (torch.randn(3, *SHAPE, generator=gen(seed)) for seed in range(3))
    p_real, p_fake = x - real, x - fake
    wanted = (p_real - p_fake) / p_real.abs().mean(dim=(1, 2, 3), keepdim=True)
    assert torch.allclose(distribution_matching_gradient(x, real, fake), wanted, atol=1e-6)


def test_fake_network_learns_at_every_step_and_the_student_at_each_fifth() -> None:
    fake = Linear(VPSchedule(), start=0.5)
    method = MLCM(extras=[DistributionMatching(fake, start=2, fake_updates=5)], refinement=Refinement(start=0))
    assert method.needs_null and set(method.critic_parameters()) == set(fake.parameters())
    assert method.parts["the distribution_matching term (its start)"] == 2
    kept, batch = networks(), batch_of(8)
    acting = []
    for step in range(9):
        output = method.losses(kept, batch, step=step, generator=gen(step))
        acting.append(output.terms["distribution_matching"].item() != 0)
        losses = method.critic_losses(kept, batch, output, step=step, generator=gen(step))
        assert set(losses) == (set() if step < 2 else {"fake"})
    assert acting == [False, False, True, False, False, False, False, True, False]
    losses["fake"].backward()
    assert fake.w.grad is not None and all(network.w.grad is None for network in (kept.teacher, kept.student))


def test_adversarial_term_trains_student_and_discriminator_apart() -> None:
    features = TinyFeatures()
    critic = Discriminator(features, features.parameters)
    method = MLCM(extras=[Adversarial(weight=0.1)], refinement=Refinement(start=0))
    assert method.needs_discriminator and method.weights == {"adversarial": 0.1}
    with pytest.raises(ValueError, match="attach"):
        method.losses(networks(), batch_of(8), step=0, generator=gen())
    method.attach(critic)
    kept, batch = networks(), batch_of(8)
    output = method.losses(kept, batch, step=0, generator=gen())
    output.terms["adversarial"].backward()
    assert kept.student.w.grad is not None and all(value.grad is None for value in method.critic_parameters())
    kept.student.zero_grad(set_to_none=True)
    losses = method.critic_losses(kept, batch, output, step=0, generator=gen())
    losses["discriminator"].backward()
    assert kept.student.w.grad is None and features.conv.weight.grad is not None
    optimizer = torch.optim.Adam(list(method.critic_parameters()), lr=1e-2)
    for _ in range(20):
        loss = method.critic_losses(kept, batch, output, step=0, generator=gen())["discriminator"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < losses["discriminator"]


def test_adversarial_stage_one_needs_latents() -> None:
    method = MLCM(extras=[Adversarial(Discriminator(TinyFeatures()))])
    kept = networks()
    output = method.losses(kept, batch_of(4), step=0, generator=gen())
    with pytest.raises(ValueError, match="no real samples"):
        method.critic_losses(kept, batch_of(4), output, step=0, generator=gen())
    assert method.critic_losses(
        kept, batch_of(4, x_0=torch.randn(4, *SHAPE, generator=gen())), output, step=0, generator=gen()
    )


def test_terms_begin_with_the_second_stage_unless_told() -> None:
    terms = [Adversarial(), PreferenceTerm(FunctionScorer(closeness), start=3), DistributionMatching()]
    method = MLCM(refinement=Refinement(start=7), extras=terms)
    assert [term.start for term in terms] == [7, 3, 7]
    assert method.parts["the adversarial term (its start)"] == 7
    alone = Adversarial()
    MLCM(extras=[alone])
    assert alone.start == 0


def test_a_term_that_is_off_costs_and_changes_nothing() -> None:
    def broken(x_0, condition):
        raise AssertionError("asked although it is off")

    plain, off = MLCM(), MLCM(extras=[PreferenceTerm(FunctionScorer(broken), weight=0.0)])
    first, second = (m.losses(networks(), batch_of(4), step=0, generator=gen()).terms for m in (plain, off))
    assert torch.equal(first["consistency"], second["consistency"]) and second["preference"] == 0
    with pytest.raises(ValueError, match="differ in name"):
        MLCM(extras=[PreferenceTerm(FunctionScorer(broken)), PreferenceTerm(FunctionScorer(broken))])
