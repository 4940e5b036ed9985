from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from distill.condition import Condition
from distill.denoiser import Denoiser
from distill.er_sde import NoiseScale
from distill.method import DistillBatch, Networks
from distill.methods.discriminator import Discriminator
from distill.methods.lcm import LCM
from distill.methods.scott import Adversary, SCott
from distill.moves import SolverSettings
from distill.schedules import FlowSchedule, VPSchedule
from distill.toy import GaussianMixtureDenoiser

VP, FLOW = VPSchedule(), FlowSchedule()
NONE = Condition()
PLAIN = Adversary(weight=0.0)


class Affine(Denoiser):
    """``weight x_t`` as ``x_0``, counting its evaluations."""

    def __init__(self, weight: float = 0.8, schedule=VP) -> None:
        super().__init__(schedule, "x0")
        self.weight = nn.Parameter(torch.tensor(weight))
        self.evaluations = 0

    def forward(self, x_t, t, condition):
        self.evaluations += len(x_t)
        return self.weight * x_t


class StateFeatures:
    """The state itself as the only feature map."""

    widths = (4,)
    schedule = VP
    is_checkpointed = False

    def __call__(self, x_t, t, condition):
        return (x_t.float(),)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_batch(size: int = 4) -> DistillBatch:
    embeds = torch.zeros(size, 1, 2)
    return DistillBatch(
        Condition(embeds=embeds),
        Condition(embeds=embeds[:1]),
        (4, 4, 4),
        torch.randn(size, 4, 4, 4, generator=seeded(9)),
    )


def make_scott(**changes) -> SCott:
    method = SCott(**changes)
    torch.manual_seed(0)
    method.attach(Discriminator(StateFeatures()))
    return method


def test_defaults_are_the_papers():
    method = SCott()
    settings = method.settings
    assert (settings.skip, settings.num_sub_steps, method.target_decay) == (24.0, 3, 0.95)
    assert method.weights == {"adversarial": 0.4}
    assert method.needs_latents and method.needs_null
    assert method.inference_times(2).tolist() == [999.0, 499.0]


@pytest.mark.parametrize("schedule", [VP, FLOW], ids=["vp", "flow"])
def test_a_perfect_consistency_function_has_no_loss_and_another_has(schedule, rand64):
    # All data in one point: whatever noise the solver adds, every trajectory ends there.
    point = rand64(1, 2, 2, 2)
    exact = GaussianMixtureDenoiser(point, 1e-6, schedule, prediction_type="v" if schedule is VP else "flow")
    wrong = GaussianMixtureDenoiser(point + 1.0, 1e-6, schedule, prediction_type="v")
    method = SCott(guidance_range=(1.0, 1.0), adversary=PLAIN, schedule=schedule)
    batch = DistillBatch(NONE, NONE, (2, 2, 2), point.expand(64, -1, -1, -1))
    perfect = method.losses(Networks(exact, exact, exact), batch, step=0, generator=seeded()).terms
    # Time 0 of Stable Diffusion's table still holds sigma = 0.03, which LCM's boundary takes for clean.
    assert set(perfect) == {"consistency"} and perfect["consistency"].item() < (3e-3 if schedule is VP else 1e-4)
    off = method.losses(Networks(wrong, exact, exact), batch, step=0, generator=seeded()).terms
    assert off["consistency"].item() > 0.9


def test_with_everything_off_it_is_lcm():
    networks, batch = Networks(Affine(), Affine(0.9), Affine(0.7)), make_batch()
    off = SCott(skip=20.0, num_sub_steps=1, solver=SolverSettings("ddim"), num_points=50, adversary=PLAIN)
    found = off.losses(networks, batch, step=0, generator=seeded()).terms["consistency"]
    expected = LCM().losses(networks, batch, step=0, generator=seeded()).terms["consistency"]
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"solver": SolverSettings("ddim")},
        {"solver": SolverSettings("ddim", eta=0.6)},
        {"solver": SolverSettings("er_sde", noise_scale=NoiseScale("sde_2"))},
        {"solver": SolverSettings("er_sde", order=2)},
        {"num_sub_steps": 1},
        {"skip": 48.0},
        {"distance": "l2"},
    ],
)
def test_every_switch_changes_the_loss(changes):
    networks, batch = Networks(Affine(), Affine(0.9), Affine(0.7)), make_batch()

    def value(**options) -> float:
        return (
            SCott(adversary=PLAIN, **options)
            .losses(networks, batch, step=0, generator=seeded())
            .terms["consistency"]
            .item()
        )

    assert value() == value() != value(**changes)


def test_the_count_of_evaluations_is_as_stated():
    networks = Networks(Affine(), Affine(), Affine())
    SCott(adversary=PLAIN).losses(networks, make_batch(4), step=0, generator=seeded())
    # the guided teacher evaluates both halves in each of three sub-steps
    assert [network.evaluations / 4 for network in (networks.student, networks.teacher, networks.target)] == [1, 6, 1]


def test_gradient_reaches_the_student_only():
    networks, method = Networks(Affine(), Affine(0.9), Affine(0.7)), make_scott()
    output = method.losses(networks, make_batch(), step=0, generator=seeded())
    sum(method.weights.get(name, 1.0) * term for name, term in output.terms.items()).backward()
    assert networks.student.weight.grad.abs() > 0
    assert networks.teacher.weight.grad is None and networks.target.weight.grad is None
    assert all(parameter.grad is None for parameter in method.critic_parameters())
    assert not output.critic_inputs["fake"].requires_grad
    networks.student.weight.grad = None
    method.critic_losses(networks, make_batch(), output, step=0, generator=seeded(1))["critic"].backward()
    assert networks.student.weight.grad is None
    assert all(parameter.grad is not None for parameter in method.critic_parameters())


def test_the_critic_learns_to_tell_and_the_student_hears_of_it():
    ramp = torch.linspace(-2.0, 2.0, 4).expand(16, 4, 4, 4)
    embeds = torch.zeros(16, 1, 2)
    batch = DistillBatch(Condition(embeds=embeds), NONE, (4, 4, 4), ramp + make_batch(16).x_0 / 4.0)
    method = make_scott(guidance_range=(1.0, 1.0), adversary=Adversary(renoise_range=(0.02, 0.3)))
    networks = Networks(Affine(0.0), Affine(), Affine())  # answers with zeros
    optimizer = torch.optim.Adam(method.critic_parameters(), lr=0.01)
    generator, losses = seeded(), []
    output = method.losses(networks, batch, step=0, generator=generator)
    for step in range(60):
        optimizer.zero_grad()
        loss = method.critic_losses(networks, batch, output, step=step, generator=generator)["critic"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    after = method.losses(networks, batch, step=0, generator=seeded()).terms["adversarial"]
    assert after.item() > 0.1  # the critic has found the answers out
    after.backward()
    assert networks.student.weight.grad.abs() > 0


def test_the_adversary_can_start_late():
    networks, batch = Networks(Affine(), Affine(), Affine()), make_batch()
    method = make_scott(adversary=Adversary(start=10))
    assert method.parts == {"the adversarial term (adversary.start)": 10}
    early = method.losses(networks, batch, step=9, generator=seeded())
    assert "adversarial" not in early.terms and "fake" in early.critic_inputs
    assert "adversarial" in method.losses(networks, batch, step=10, generator=seeded()).terms


def test_equal_samples_are_scored_equally():
    # Real and fake are shown at the same times and noise: nothing but the samples can tell them apart.
    method, batch = make_scott(), make_batch()
    real, fake = method._scores(method.discriminator, batch, seeded(), batch.x_0, batch.x_0.clone())
    assert torch.equal(real[0], fake[0])
    real, fake = method._scores(method.discriminator, batch, seeded(), batch.x_0, -batch.x_0)
    assert not torch.equal(real[0], fake[0])


def test_a_seed_decides_all_terms():
    networks, method, batch = Networks(Affine(), Affine(), Affine()), make_scott(), make_batch()
    first, second = (method.losses(networks, batch, step=0, generator=seeded(3)) for _ in range(2))
    for name in ("consistency", "adversarial"):
        assert torch.equal(first.terms[name], second.terms[name])
    assert_close(first.critic_inputs["fake"], second.critic_inputs["fake"])


def test_refuses_to_run_without_its_parts():
    networks, batch = Networks(Affine(), Affine(), Affine()), make_batch()
    with pytest.raises(ValueError, match="call attach"):
        SCott().losses(networks, batch, step=0, generator=seeded())
    with pytest.raises(ValueError, match="no effect"):
        SCott(adversary=PLAIN).attach(Discriminator(StateFeatures()))
    with pytest.raises(ValueError, match="SCott is trained on latents"):
        bare = DistillBatch(batch.condition, batch.null, (4, 4, 4))
        SCott(adversary=PLAIN).losses(networks, bare, step=0, generator=seeded())
    with pytest.raises(ValueError, match=r"-1\.0"):
        Adversary(weight=-1.0)
    assert list(SCott(adversary=PLAIN).critic_parameters()) == []
