from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from distill import parameterization as p
from distill.parameterization import Coefficients, prediction_type_from_config
from distill.schedules import FlowSchedule, VPSchedule

TIMES = torch.tensor([0.5, 13.0, 400.25, 998.0], dtype=torch.float64)
COEFFICIENTS = {
    "vp": VPSchedule().coefficients(TIMES),
    "flow": FlowSchedule().coefficients(TIMES),
    "neither": Coefficients(torch.tensor([0.9, 0.5, 2.0, 0.1]).double(), torch.tensor([0.3, 0.9, 5.0, 0.7]).double()),
}
SHAPE = (4, 3, 2, 2)


@pytest.fixture(params=COEFFICIENTS)
def coef(request) -> Coefficients:
    return COEFFICIENTS[request.param]


@pytest.mark.parametrize(
    ("there", "back"),
    [
        (p.x0_to_eps, p.eps_to_x0),
        (p.eps_to_x0, p.x0_to_eps),
        (p.x0_to_v, p.v_to_x0),
        (p.v_to_x0, p.x0_to_v),
        (p.eps_to_v, p.v_to_eps),
        (p.v_to_eps, p.eps_to_v),
        (p.x0_to_flow, p.flow_to_x0),
        (p.flow_to_x0, p.x0_to_flow),
        (p.eps_to_flow, p.flow_to_eps),
        (p.flow_to_eps, p.eps_to_flow),
    ],
)
def test_prediction_survives_a_round_trip(there, back, coef, rand64):
    x_t, value = rand64(*SHAPE), rand64(*SHAPE)
    assert_close(back(x_t, there(x_t, value, coef), coef), value, rtol=1e-9, atol=1e-9)


def test_every_conversion_recovers_the_known_pair(coef, rand64):
    x_0, eps = rand64(*SHAPE), rand64(*SHAPE)
    x_t = p.diffuse(x_0, eps, coef)
    v, u = p.v_from_pair(x_0, eps, coef), p.flow_from_pair(x_0, eps)
    close = {"rtol": 1e-9, "atol": 1e-9}
    for x_0_hat in (p.eps_to_x0(x_t, eps, coef), p.v_to_x0(x_t, v, coef), p.flow_to_x0(x_t, u, coef)):
        assert_close(x_0_hat, x_0, **close)
    for eps_hat in (p.x0_to_eps(x_t, x_0, coef), p.v_to_eps(x_t, v, coef), p.flow_to_eps(x_t, u, coef)):
        assert_close(eps_hat, eps, **close)
    for v_hat in (p.x0_to_v(x_t, x_0, coef), p.eps_to_v(x_t, eps, coef)):
        assert_close(v_hat, v, **close)
    for u_hat in (p.x0_to_flow(x_t, x_0, coef), p.eps_to_flow(x_t, eps, coef)):
        assert_close(u_hat, u, **close)


def test_v_and_flow_are_finite_at_both_ends(rand64):
    x_t, value = rand64(2, 3), rand64(2, 3)
    ends = VPSchedule(rescale_betas_zero_snr=True).coefficients(torch.tensor([-1.0, 999.0]))
    for convert in (p.v_to_x0, p.v_to_eps, p.flow_to_x0, p.flow_to_eps):
        assert convert(x_t, value, ends).isfinite().all()


def test_vp_and_flow_coordinates_are_inverse_and_name_the_same_state(rand64):
    vp, flow = VPSchedule(), FlowSchedule()
    flow_t = flow.t_from_lambda(vp.lambda_t(TIMES))
    coef_vp, coef_flow = vp.coefficients(TIMES), flow.coefficients(flow_t)
    x_0, eps = rand64(*SHAPE), rand64(*SHAPE)
    x_t, z = p.diffuse(x_0, eps, coef_vp), p.diffuse(x_0, eps, coef_flow)
    assert_close(p.change_schedule(x_t, coef_vp, coef_flow), z)
    assert_close(p.change_schedule(z, coef_flow, coef_vp), x_t)
    assert_close(z, x_t / p.like(coef_vp.alpha + coef_vp.sigma, x_t))
    # v(Z, s) = (Z - eps) / s with s = 1 - sigma is the papers' velocity, the negative of ours.
    assert_close(-(z - eps) / p.like(coef_flow.alpha, z), p.flow_from_pair(x_0, eps))


def test_per_sample_coefficients_equal_one_by_one(rand64):
    coef, x_t, v = COEFFICIENTS["vp"], rand64(*SHAPE), rand64(*SHAPE)
    together = p.v_to_x0(x_t, v, coef)
    for i in range(4):
        single = p.v_to_x0(x_t[i : i + 1], v[i : i + 1], Coefficients(coef.alpha[i], coef.sigma[i]))
        assert_close(together[i : i + 1], single, rtol=0, atol=0)


def test_half_precision_is_combined_in_float32():
    # alpha_999 = 0.068: in half precision the division alone would cost three digits.
    x_t, eps = torch.randn(1, 64).half(), torch.randn(1, 64).half()
    coef = VPSchedule().coefficients(torch.tensor([999]))
    x_0 = p.eps_to_x0(x_t, eps, coef)
    assert x_0.dtype == torch.float32
    assert_close(x_0.double(), p.eps_to_x0(x_t.double(), eps.double(), coef), rtol=1e-4, atol=1e-4)


def test_coefficients_of_the_wrong_batch_are_refused():
    with pytest.raises(ValueError, match=r"\(3,\)"):
        p.like(torch.ones(3), torch.zeros(2, 4))


def test_prediction_types_are_read_from_configurations():
    named = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
    for theirs, ours in named.items():
        assert prediction_type_from_config({"beta_schedule": "linear", "prediction_type": theirs}) == ours
    assert prediction_type_from_config({"beta_schedule": "linear"}) == "eps"
    assert prediction_type_from_config({"shift": 1.0}) == "flow"
    assert prediction_type_from_config({"beta_schedule": "linear", "use_flow_sigmas": True}) == "flow"
    with pytest.raises(ValueError, match="'score'"):
        prediction_type_from_config({"beta_schedule": "linear", "prediction_type": "score"})
