"""The same prediction, said as ``x0``, ``eps``, ``v`` or flow velocity: pure functions and their inverses.

A network that sees ``x_t = alpha x_0 + sigma eps`` may predict any of

* ``x0``: the clean latent,
* ``eps``: the noise,
* ``v = alpha eps - sigma x_0`` (arXiv 2202.00512, appendix D),
* ``flow``: ``u = eps - x_0``, the velocity ``dx/dsigma`` of rectified flow, in the sign diffusers' flow models use
  (the papers' ``dZ/ds`` is its negative).

Given ``x_t`` each determines the others. The formulas hold for every ``alpha, sigma`` (not only variance preserving
ones): inverting the 2x2 system gives the divisors ``alpha^2 + sigma^2`` for v and ``alpha + sigma`` for flow, both 1
on their home schedule. Divisions by zero remain where information is truly missing: ``eps_to_x0`` at ``alpha = 0`` and
``x0_to_eps`` at ``sigma = 0``.

Shapes: ``x_t``, ``x_0``, ``eps``, ``v``, ``u`` are (B, ...) and alike; ``coef.alpha``, ``coef.sigma`` are (B,) or ().
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from distill._config import read_bool, read_str

PredictionType = Literal["eps", "v", "x0", "flow"]
PREDICTION_TYPES: tuple[PredictionType, ...] = get_args(PredictionType)

_DIFFUSERS_NAMES: Mapping[str, PredictionType] = {
    "epsilon": "eps",
    "v_prediction": "v",
    "sample": "x0",
    "flow_prediction": "flow",
}


@dataclass(frozen=True, slots=True, eq=False)
class Coefficients:
    """Weights of signal and noise in ``x_t = alpha x_0 + sigma eps``."""

    alpha: Tensor  # (B,) or (), in [0, 1]
    sigma: Tensor  # (B,) or (), in [0, 1]


def like(coefficient: Tensor, x: Tensor) -> Tensor:
    """Shape a per-sample number (B,) or () so that it multiplies ``x`` (B, ...); the one place of broadcasting.

    The result has ``x``'s dtype, but at least float32: half-precision states are combined in float32, because
    ``1 / alpha`` is up to 15 for Stable Diffusion and amplifies every rounding.

    Raises:
        ValueError: The coefficient is neither a scalar nor one number per sample.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    coefficient = coefficient.to(device=x.device, dtype=dtype)
    if coefficient.ndim == 0:
        return coefficient
    if coefficient.ndim != 1 or coefficient.shape[0] not in (1, x.shape[0]):
        raise ValueError(f"expected () or ({x.shape[0]},) coefficients, got shape {tuple(coefficient.shape)}")
    return coefficient.reshape(-1, *[1] * (x.ndim - 1))


def diffuse(x_0: Tensor, eps: Tensor, coef: Coefficients) -> Tensor:
    """``x_t = alpha x_0 + sigma eps``."""
    return like(coef.alpha, x_0) * x_0 + like(coef.sigma, x_0) * eps


def eps_to_x0(x_t: Tensor, eps: Tensor, coef: Coefficients) -> Tensor:
    """``x_0 = (x_t - sigma eps) / alpha``; infinite at ``alpha = 0``, where noise says nothing about the image."""
    return (x_t - like(coef.sigma, x_t) * eps) / like(coef.alpha, x_t)


def x0_to_eps(x_t: Tensor, x_0: Tensor, coef: Coefficients) -> Tensor:
    """``eps = (x_t - alpha x_0) / sigma``; undefined at ``sigma = 0``, where no noise is left."""
    return (x_t - like(coef.alpha, x_t) * x_0) / like(coef.sigma, x_t)


def v_to_x0(x_t: Tensor, v: Tensor, coef: Coefficients) -> Tensor:
    """``x_0 = (alpha x_t - sigma v) / (alpha^2 + sigma^2)``."""
    alpha, sigma = like(coef.alpha, x_t), like(coef.sigma, x_t)
    return (alpha * x_t - sigma * v) / (alpha**2 + sigma**2)


def v_to_eps(x_t: Tensor, v: Tensor, coef: Coefficients) -> Tensor:
    """``eps = (sigma x_t + alpha v) / (alpha^2 + sigma^2)``."""
    alpha, sigma = like(coef.alpha, x_t), like(coef.sigma, x_t)
    return (sigma * x_t + alpha * v) / (alpha**2 + sigma**2)


def x0_to_v(x_t: Tensor, x_0: Tensor, coef: Coefficients) -> Tensor:
    """``v`` of the state whose clean part is ``x_0``; undefined at ``sigma = 0``."""
    return v_from_pair(x_0, x0_to_eps(x_t, x_0, coef), coef)


def eps_to_v(x_t: Tensor, eps: Tensor, coef: Coefficients) -> Tensor:
    """``v`` of the state whose noise is ``eps``; infinite at ``alpha = 0``."""
    return v_from_pair(eps_to_x0(x_t, eps, coef), eps, coef)


def flow_to_x0(x_t: Tensor, u: Tensor, coef: Coefficients) -> Tensor:
    """``x_0 = (x_t - sigma u) / (alpha + sigma)``."""
    alpha, sigma = like(coef.alpha, x_t), like(coef.sigma, x_t)
    return (x_t - sigma * u) / (alpha + sigma)


def flow_to_eps(x_t: Tensor, u: Tensor, coef: Coefficients) -> Tensor:
    """``eps = (x_t + alpha u) / (alpha + sigma)``."""
    alpha, sigma = like(coef.alpha, x_t), like(coef.sigma, x_t)
    return (x_t + alpha * u) / (alpha + sigma)


def x0_to_flow(x_t: Tensor, x_0: Tensor, coef: Coefficients) -> Tensor:
    """``u = eps - x_0`` of the state whose clean part is ``x_0``; undefined at ``sigma = 0``."""
    return flow_from_pair(x_0, x0_to_eps(x_t, x_0, coef))


def eps_to_flow(x_t: Tensor, eps: Tensor, coef: Coefficients) -> Tensor:
    """``u = eps - x_0`` of the state whose noise is ``eps``; infinite at ``alpha = 0``."""
    return flow_from_pair(eps_to_x0(x_t, eps, coef), eps)


def v_from_pair(x_0: Tensor, eps: Tensor, coef: Coefficients) -> Tensor:
    """``v = alpha eps - sigma x_0`` (arXiv 2202.00512, appendix D)."""
    return like(coef.alpha, x_0) * eps - like(coef.sigma, x_0) * x_0


def flow_from_pair(x_0: Tensor, eps: Tensor) -> Tensor:
    """``u = eps - x_0``, the derivative of a straight path with respect to sigma (arXiv 2209.03003, eq. 1)."""
    return eps - x_0


def change_schedule(x_t: Tensor, coef_from: Coefficients, coef_to: Coefficients) -> Tensor:
    """The same state on another schedule, at equal ``lambda = sigma / alpha``.

    ``x_0`` and ``eps`` stay, only the scale changes. With VP coefficients first and flow coefficients second this is
    ``Z = x_t / (alpha_t + sigma_t)``; the other way round it is the inverse. Exact, and finite at both ends.
    Carry the time with ``schedule_to.t_from_lambda(schedule_from.lambda_t(t))``.

    Args:
        x_t: (B, ...) state on the first schedule.
        coef_from: Its coefficients.
        coef_to: Coefficients of the same ``lambda`` on the second schedule.
    """
    total_from = like(coef_from.alpha + coef_from.sigma, x_t)
    total_to = like(coef_to.alpha + coef_to.sigma, x_t)
    return x_t * (total_to / total_from)


def prediction_type_from_config(config: Mapping[str, object]) -> PredictionType:
    """What a network trained with a diffusers scheduler configuration predicts.

    Flow-matching schedulers do not say; they are known by having no betas.

    Raises:
        ValueError: An unknown ``prediction_type``.
    """
    is_flow = "shift" in config or "FlowMatch" in read_str(config, "_class_name", "")
    if (is_flow and "beta_schedule" not in config) or read_bool(config, "use_flow_sigmas", False):
        return "flow"
    name = read_str(config, "prediction_type", "epsilon")
    if name not in _DIFFUSERS_NAMES:
        raise ValueError(f"prediction_type must be one of {sorted(_DIFFUSERS_NAMES)}, got {name!r}")
    return _DIFFUSERS_NAMES[name]
