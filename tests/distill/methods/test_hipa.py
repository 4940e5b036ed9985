"""HiPA: one-step prediction, normalised terms, gradients in the student only, and the paper's parameter counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from distill.condition import Condition
from distill.denoiser import Denoiser
from distill.frequency import low_pass
from distill.method import DistillBatch, Networks
from distill.methods.hipa import HiPA, parameters_per_rank, rank_for_share, relative_error
from distill.methods.pairs import TeacherSolver
from distill.schedules import VPSchedule

SHAPE = (3, 16, 16)


class Conv(Denoiser):
    """One convolution."""

    def __init__(self) -> None:
        super().__init__(VPSchedule(), "eps")
        self.net = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        assert condition.embeds is None  # the null pass must not happen where there is no null condition
        return self.net(x_t)


class Fixed(Denoiser):
    """Predicts a given x_0 whatever it is shown."""

    def __init__(self, x_0: Tensor) -> None:
        super().__init__(VPSchedule(), "x0")
        self.x_0 = nn.Parameter(x_0.clone())

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        assert t.tolist() == [999.0] * len(t)
        return self.x_0


class Same(nn.Module):
    """A decoder whose images are the latents."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def decode(self, latents: Tensor) -> Tensor:
        return self.gain * latents


def pairs(size: int = 2) -> DistillBatch:
    draw = torch.Generator().manual_seed(0)
    x_0, noise = (torch.randn(size, *SHAPE, generator=draw) for _ in range(2))
    return DistillBatch(Condition(), Condition(), SHAPE, x_0=x_0, noise=noise)


def terms(method: HiPA, student: Denoiser, batch: DistillBatch) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return method.losses(Networks(student, student, student), batch, step=0, generator=generator).terms


def test_a_perfect_student_has_no_loss_and_a_black_one_counts_one():
    batch = pairs()
    method = HiPA(l2_weight=1.0)
    assert batch.x_0 is not None
    for value in terms(method, Fixed(batch.x_0), batch).values():
        assert value.item() == pytest.approx(0.0, abs=1e-6)
    black = terms(method, Fixed(torch.zeros_like(batch.x_0)), batch)
    assert black["frequency"].item() == pytest.approx(1.0, abs=1e-5)
    assert black["edges"].item() == pytest.approx(1.0, abs=1e-4)
    assert black["l2"].item() == pytest.approx(1.0, abs=1e-5)


def test_terms_do_not_depend_on_contrast():
    batch = pairs()
    assert batch.x_0 is not None and batch.noise is not None
    faint = DistillBatch(Condition(), Condition(), SHAPE, x_0=batch.x_0 / 10, noise=batch.noise)
    half, half_faint = (terms(HiPA(), Fixed(b.x_0 / 2), b) for b in (batch, faint))
    assert_close(half["frequency"], half_faint["frequency"])
    assert_close(half["edges"], half_faint["edges"], rtol=1e-4, atol=1e-4)


def test_blur_is_seen_by_the_high_frequency_terms_more_than_by_the_squared_error():
    smooth = low_pass(pairs().x_0, 0.1) * 10
    target = smooth + 0.1 * pairs().x_0
    batch = DistillBatch(Condition(), Condition(), SHAPE, x_0=target, noise=pairs().noise)
    found = terms(HiPA(l2_weight=1.0, radius=0.4), Fixed(smooth), batch)
    assert found["frequency"].item() > 10 * found["l2"].item()


def test_gradients_reach_the_student_only():
    student, teacher, decoder = Conv(), Conv(), Same()
    method = HiPA(decoder=decoder, perceptual=nn.MSELoss(), solver=TeacherSolver("ddim", 3, 7.5), crop=8)
    batch = DistillBatch(Condition(pooled=torch.zeros(2, 1)), Condition(), SHAPE)
    output = method.losses(
        Networks(student, teacher, student), batch, step=0, generator=torch.Generator().manual_seed(0)
    )
    assert output.terms.keys() == method.weights.keys() == {"spatial", "frequency", "edges"}
    torch.stack(list(output.terms.values())).sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in student.parameters())
    assert all(p.grad is None for module in (teacher, decoder) for p in module.parameters())
    assert not method.state_dict()


def test_the_same_seed_gives_the_same_terms():
    student = Conv()
    batch = DistillBatch(Condition(pooled=torch.zeros(2, 1)), Condition(), SHAPE)
    method = HiPA(solver=TeacherSolver("ddim", 3))
    assert_close(terms(method, student, batch), terms(method, student, batch), rtol=0, atol=0)


def test_terms_without_weight_are_not_computed():
    batch = pairs()
    assert terms(HiPA(frequency_weight=0.0, edge_weight=0.0), Conv(), batch).keys() == {"spatial"}
    with pytest.raises(ValueError, match="weights"):
        HiPA(edge_weight=-1.0)


def test_one_step_at_the_noisiest_time():
    assert HiPA().inference_times(1).tolist() == [999.0]
    with pytest.raises(ValueError, match="1 step"):
        HiPA().inference_times(2)


def test_relative_error_of_half_is_a_half():
    target = torch.tensor([2.0, -4.0])
    assert float(relative_error(target / 2, target)) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("options", "per_rank"),
    [
        ({"cross_attention_dim": 768, "attention_head_dim": 8}, 199_296),
        ({"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}, 207_488),
    ],
)
def test_rank_16_on_stable_diffusion_is_the_papers_parameter_count(options, per_rank):
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**options)
    assert parameters_per_rank(unet) == per_rank
    assert rank_for_share(unet) == 16


def test_a_small_network_gets_at_least_rank_one():
    network = nn.ModuleDict({"to_q": nn.Linear(4, 4)})
    assert rank_for_share(network, share=0.001) == 1
    with pytest.raises(ValueError, match="no linear layer"):
        parameters_per_rank(nn.ModuleDict({"conv": nn.Conv2d(1, 1, 1)}))
