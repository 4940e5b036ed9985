"""Single solver steps from time t to time s < t, as pure functions of states, predictions and coefficients.

All of them integrate the probability-flow ODE (or, with ``eta > 0``, the reverse SDE) of states
``x_t = alpha x_0 + sigma eps`` and hold for every schedule, variance preserving or flow. States and predictions are
(B, C, h, w); coefficients are (B,) or (), so the samples of a batch may be at different times.
"""

from __future__ import annotations

from torch import Tensor

from distill.denoiser import Prediction
from distill.parameterization import Coefficients, like


def ddim_step(
    x_t: Tensor,
    prediction: Prediction,
    coef_t: Coefficients,
    coef_s: Coefficients,
    *,
    eta: float = 0.0,
    noise: Tensor | None = None,
) -> Tensor:
    """DDIM (arXiv 2010.02502, eq. 12 and 16), first order; ``eta = 0`` is deterministic, ``eta = 1`` DDPM ancestral.

    ``x_s = alpha_s x_0 + sqrt(sigma_s^2 - eta^2 q^2) eps + eta q xi`` with ``q^2 = sigma_s^2 (1 - lambda_s^2 /
    lambda_t^2)``, the posterior variance; this form of q does not assume a variance-preserving schedule.

    Args:
        x_t: (B, C, h, w) state at t. The deterministic step needs it only through the prediction.
        prediction: The denoiser's prediction at ``x_t``.
        coef_t: Coefficients at t.
        coef_s: Coefficients at s.
        eta: Amount of noise.
        noise: ``xi`` (B, C, h, w), standard normal; required if ``eta > 0``.

    Returns:
        (B, C, h, w) state at s.

    Raises:
        ValueError: ``eta`` is negative, or positive without noise.
    """
    alpha_s, sigma_s = like(coef_s.alpha, x_t), like(coef_s.sigma, x_t)
    if eta == 0.0:
        return alpha_s * prediction.x_0 + sigma_s * prediction.eps
    if eta < 0.0:
        raise ValueError(f"eta must be >= 0, got {eta}")
    if noise is None:
        raise ValueError(f"eta = {eta} needs noise")
    # q^2 is a difference of close numbers for short steps: taken in the coefficients' own float64.
    ratio = coef_t.alpha * coef_s.sigma / (coef_s.alpha * coef_t.sigma)
    spread = eta * coef_s.sigma * (1.0 - ratio**2).clamp(min=0.0).sqrt()
    kept = (coef_s.sigma**2 - spread**2).clamp(min=0.0).sqrt()
    return alpha_s * prediction.x_0 + like(kept, x_t) * prediction.eps + like(spread, x_t) * noise


def euler_step(x_t: Tensor, prediction: Prediction, coef_t: Coefficients, coef_s: Coefficients) -> Tensor:
    """Euler step of the straight path: ``Z_s = Z_t + (f_s - f_t) (eps - x_0)``, ``Z = x / (alpha + sigma)``.

    ``f = sigma / (alpha + sigma)`` is rectified-flow time (0 clean, 1 noise); on a ``FlowSchedule`` ``Z = x`` and this
    is the update of diffusers' FlowMatchEulerDiscreteScheduler. On a variance-preserving schedule it equals
    deterministic DDIM, which is Euler in these coordinates. Shapes as in ``ddim_step``.
    """
    return _flow_step(x_t, prediction.flow, coef_t, coef_s)


def heun_step(
    x_t: Tensor, prediction_t: Prediction, prediction_s: Prediction, coef_t: Coefficients, coef_s: Coefficients
) -> Tensor:
    """Heun's step (explicit trapezoid), second order, in the straight coordinates of ``euler_step``.

    These stay finite from pure noise to the clean latent, where EDM's (arXiv 2206.00364, Algorithm 1) do not.

    Args:
        x_t: (B, C, h, w) state at t.
        prediction_t: Prediction at ``x_t``.
        prediction_s: Prediction at the Euler step's result, at time s.
        coef_t: Coefficients at t.
        coef_s: Coefficients at s.

    Returns:
        (B, C, h, w) state at s.
    """
    return _flow_step(x_t, (prediction_t.flow + prediction_s.flow) / 2.0, coef_t, coef_s)


def dpmpp_2m_step(
    x_t: Tensor,
    prediction: Prediction,
    coef_t: Coefficients,
    coef_s: Coefficients,
    *,
    previous: Prediction,
    coef_previous: Coefficients,
) -> Tensor:
    """DPM-Solver++(2M) (arXiv 2211.01095, Algorithm 2): second order from one evaluation per step.

    In ``l = -log(lambda)``: ``x_s = (sigma_s / sigma_t) x_t + alpha_s (1 - lambda_s / lambda_t) D``, with
    ``D = x_0 + (h / 2 h_prev) (x_0 - x_0_prev)``. Needs s to be noisy (``sigma_s > 0``); end with ``ddim_step``.

    Args:
        x_t: (B, C, h, w) state at t.
        prediction: Prediction at ``x_t``.
        coef_t: Coefficients at t.
        coef_s: Coefficients at s.
        previous: Prediction of the step before, at the time where ``coef_previous`` holds.
        coef_previous: Coefficients of the step before (noisier than t).

    Returns:
        (B, C, h, w) state at s.
    """
    lambda_t, lambda_s = coef_t.sigma / coef_t.alpha, coef_s.sigma / coef_s.alpha
    step = (lambda_t / lambda_s).log()
    step_before = (coef_previous.sigma / coef_previous.alpha / lambda_t).log()
    slope = like(step / (2.0 * step_before), x_t)
    estimate = prediction.x_0 + slope * (prediction.x_0 - previous.x_0)
    gain = coef_s.alpha * (1.0 - lambda_s / lambda_t)
    return like(coef_s.sigma / coef_t.sigma, x_t) * x_t + like(gain, x_t) * estimate


def _flow_step(x_t: Tensor, flow: Tensor, coef_t: Coefficients, coef_s: Coefficients) -> Tensor:
    """Move along a given flow velocity in the coordinates ``Z = x / (alpha + sigma)``."""
    total_t, total_s = coef_t.alpha + coef_t.sigma, coef_s.alpha + coef_s.sigma
    length = total_s * (coef_s.sigma / total_s - coef_t.sigma / total_t)
    return like(total_s / total_t, x_t) * x_t + like(length, x_t) * flow
