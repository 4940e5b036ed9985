from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from distill.condition import Condition
from distill.denoiser import Denoiser, GuidedDenoiser, RescheduledDenoiser
from distill.parameterization import PREDICTION_TYPES
from distill.schedules import FlowSchedule, VPSchedule
from distill.toy import GaussianMixtureDenoiser

T = torch.tensor([20.0, 400.5, 900.0])


class LinearDenoiser(Denoiser):
    """Output depends on state, time and condition, and the number of calls is recorded."""

    def __init__(self, prediction_type="eps"):
        super().__init__(VPSchedule(), prediction_type)
        self.layer = nn.Linear(4, 4, dtype=torch.float64)
        self.batches: list[int] = []

    def forward(self, x_t, t, condition):
        self.batches.append(len(x_t))
        return self.layer(x_t) + 1e-3 * t[:, None] + condition.embeds.sum(dim=(1, 2))[:, None] ** 2 * x_t


def condition(rand64, batch=3) -> Condition:
    return Condition(embeds=rand64(batch, 2, 2))


def mixture(schedule, prediction_type) -> GaussianMixtureDenoiser:
    means = torch.tensor([[-1.0, 0.5], [1.5, 0.0], [0.0, -2.0]], dtype=torch.float64)
    return GaussianMixtureDenoiser(means, 0.3, schedule, prediction_type=prediction_type)


@pytest.mark.parametrize("schedule", [VPSchedule(), FlowSchedule()], ids=["vp", "flow"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_all_prediction_types_read_the_same(prediction_type, schedule, rand64):
    x_t = rand64(3, 2)
    expected = mixture(schedule, "x0").predict(x_t, T, Condition())
    found = mixture(schedule, prediction_type).predict(x_t, T, Condition())
    assert_close(found.x_0, expected.x_0, rtol=1e-9, atol=1e-9)
    assert_close(found.eps, expected.eps, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_target_is_what_reads_back_as_the_truth(prediction_type, rand64):
    class Oracle(Denoiser):
        def forward(self, x_t, t, condition):
            return self.target(x_0, eps, t)

    x_0, eps = rand64(3, 4), rand64(3, 4)
    oracle = Oracle(VPSchedule(), prediction_type)
    prediction = oracle.predict(oracle.schedule.add_noise(x_0, eps, T), T, Condition())
    assert_close(prediction.x_0, x_0, rtol=1e-9, atol=1e-9)
    assert_close(prediction.eps, eps, rtol=1e-9, atol=1e-9)
    coef = oracle.schedule.coefficients(T)
    assert_close(prediction.v(coef), Oracle(VPSchedule(), "v").target(x_0, eps, T), rtol=1e-9, atol=1e-9)


def test_the_exact_denoiser_minimises_the_regression_loss(rand64):
    # 20,000 draws: the optimum beats slightly scaled versions of itself by far more than the sampling error.
    exact = mixture(VPSchedule(), "v")
    generator = torch.Generator().manual_seed(1)
    x_0, eps = exact.draw(20_000, generator), rand64(20_000, 2)
    x_t, t = exact.schedule.add_noise(x_0, eps, 300.0), torch.full((20_000,), 300.0)
    output, target = exact(x_t, t, Condition()), exact.target(x_0, eps, 300.0)
    losses = [((factor * output - target) ** 2).mean().item() for factor in (0.95, 1.0, 1.05)]
    assert losses[1] == min(losses)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_guidance_extrapolates_both_readings(prediction_type, rand64):
    inner = LinearDenoiser(prediction_type)
    x_t, given, null = rand64(3, 4), condition(rand64), condition(rand64, 1)
    guided = GuidedDenoiser(inner, 4.5, null).predict(x_t, T, given)
    with_text, without = inner.predict(x_t, T, given), inner.predict(x_t, T, null.expand(3))
    assert_close(guided.x_0, without.x_0 + 4.5 * (with_text.x_0 - without.x_0), rtol=1e-9, atol=1e-9)
    assert_close(guided.eps, without.eps + 4.5 * (with_text.eps - without.eps), rtol=1e-9, atol=1e-9)
    assert inner.batches[0] == 6  # one doubled batch


def test_guidance_of_one_is_the_conditional_model_in_a_single_pass(rand64):
    inner = LinearDenoiser()
    x_t, given, null = rand64(3, 4), condition(rand64), condition(rand64, 1)
    for scale in (1.0, 0.0):
        assert_close(GuidedDenoiser(inner, scale, null)(x_t, T, given), inner(x_t, T, given), rtol=0, atol=0)
    assert set(inner.batches) == {3}


def test_guidance_can_differ_per_sample(rand64):
    inner = LinearDenoiser()
    x_t, given, null = rand64(3, 4), condition(rand64), condition(rand64, 1)
    scales = torch.tensor([1.0, 3.0, 7.5], dtype=torch.float64)
    together = GuidedDenoiser(inner, scales, null)(x_t, T, given)
    for i, scale in enumerate(scales):
        single = GuidedDenoiser(inner, float(scale), null)(x_t[i : i + 1], T[i : i + 1], given[i : i + 1])
        assert_close(together[i : i + 1], single)


def test_lcm_weight_is_one_less_than_the_guidance_scale(rand64):
    inner = LinearDenoiser()
    x_t, given, null = rand64(3, 4), condition(rand64), condition(rand64, 1)
    weight = 6.5
    lcm = (1 + weight) * inner(x_t, T, given) - weight * inner(x_t, T, null.expand(3))
    guided = GuidedDenoiser(inner, GuidedDenoiser.from_lcm_weight(weight), null)
    assert_close(guided(x_t, T, given), lcm)


def test_guidance_without_a_null_condition_is_refused():
    with pytest.raises(ValueError, match="null"):
        GuidedDenoiser(LinearDenoiser(), 2.0, Condition())


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_vp_model_seen_as_a_flow_is_the_exact_flow_model(prediction_type, rand64):
    exact = mixture(FlowSchedule(), "flow")
    seen = RescheduledDenoiser(mixture(VPSchedule(), prediction_type), FlowSchedule(), "flow")
    x_t = rand64(3, 2)
    assert_close(seen(x_t, T, Condition()), exact(x_t, T, Condition()), rtol=1e-9, atol=1e-9)


def test_a_flow_model_seen_as_vp_is_the_exact_vp_model(rand64):
    exact = mixture(VPSchedule(), "eps")
    seen = RescheduledDenoiser(mixture(FlowSchedule(), "flow"), VPSchedule(), "eps")
    x_t = rand64(3, 2)
    assert_close(seen(x_t, T, Condition()), exact(x_t, T, Condition()), rtol=1e-9, atol=1e-9)


def test_beyond_the_inner_schedule_the_prediction_stays_finite(rand64):
    seen = RescheduledDenoiser(mixture(VPSchedule(), "eps"), FlowSchedule(), "flow")
    assert seen(rand64(1, 2), torch.tensor([1000.0]), Condition()).isfinite().all()


def test_unknown_prediction_type_is_refused():
    with pytest.raises(ValueError, match="'score'"):
        LinearDenoiser("score")
