"""ER-SDE solvers, orders 1 to 3 (arXiv 2309.06169): reverse SDEs whose amount of noise follows the noise level.

Every function ``phi`` of the family gives the right marginals; how fast it grows says how much of the old noise a step
replaces by fresh noise. Written as ``phi(lambda) = lambda psi(lambda)``, ``lambda = sigma / alpha``, the first-order
step from t to s is

    ``x_s = alpha_s x_0 + sigma_s (q eps + sqrt(1 - q^2) xi)``, ``q = psi(lambda_s) / psi(lambda_t)``

(the released solver's variance-preserving step, rearranged). It holds for every schedule, is finite from
pure noise to the clean end, and shows two identities: ``phi = lambda`` is DDIM with ``eta = 0``, ``phi = lambda^2`` is
DDIM with ``eta = 1``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from distill.denoiser import Prediction
from distill.parameterization import Coefficients, like
from distill.samplers import Solver, Step

NoiseScaleKind = Literal["ode", "reverse_sde", "sde_1", "sde_2", "sde_3", "sde_4", "sde_5"]
"""The seven functions of the released solver, in its order (its types 1 to 7)."""

Quadrature = Literal["riemann", "simpson"]
"""Left Riemann sum, as the released solver, or Simpson's rule in ``log lambda``."""

# psi is asked inside these bounds only, so that neither the clean end (0) nor pure noise (infinity) gives 0/0.
_LAMBDA_MIN, _LAMBDA_MAX = 1e-12, 1e12


@dataclass(frozen=True)  # no slots: as a default argument, jsonargparse reads it by vars()
class NoiseScale:
    """A noise-scale function ``phi``.

    ===============  ============================================================
    ``ode``          ``l``: no noise
    ``reverse_sde``  ``l^2``: DDPM's ancestral sampling
    ``sde_1``        ``l (exp(l^(eta - 1) / (eta - 1)) + 10)``
    ``sde_2``        ``l^1.5``
    ``sde_3``        ``l^2.5``: more noise than the reverse SDE
    ``sde_4``        ``l^0.9 log10(1 + 100 l^1.5)``
    ``sde_5``        ``l (exp(l^0.3) + 10)``: the paper's recommendation, mild noise
    ===============  ============================================================

    Attributes:
        kind: Which function.
        eta: The parameter of ``sde_1``, >= 0 and not 1; without effect elsewhere.

    Raises:
        ValueError: Unknown kind or bad ``eta``.
    """

    kind: NoiseScaleKind = "sde_5"
    eta: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(NoiseScaleKind):
            raise ValueError(f"kind must be one of {get_args(NoiseScaleKind)}, got {self.kind!r}")
        if self.eta < 0.0 or self.eta == 1.0:
            raise ValueError(f"eta must be >= 0 and not 1, got {self.eta}")
        if self.eta and self.kind != "sde_1":
            raise ValueError(f"eta only applies to sde_1, got {self.eta} with {self.kind}")

    def __call__(self, lam: Tensor) -> Tensor:
        """``phi(lambda)``; any shape."""
        return lam * self.relative(lam)

    def relative(self, lam: Tensor) -> Tensor:
        """``psi(lambda) = phi(lambda) / lambda``; any shape, may be infinite at pure noise."""
        lam = lam.clamp(_LAMBDA_MIN, _LAMBDA_MAX)
        if self.kind == "ode":
            return torch.ones_like(lam)
        if self.kind == "reverse_sde":
            return lam
        if self.kind == "sde_1":
            return (lam ** (self.eta - 1.0) / (self.eta - 1.0)).exp() + 10.0
        if self.kind == "sde_2":
            return lam.sqrt()
        if self.kind == "sde_3":
            return lam**1.5
        if self.kind == "sde_4":
            return lam**-0.1 * torch.log10(1.0 + 100.0 * lam**1.5)
        return (lam**0.3).exp() + 10.0

    def kept(self, coef_t: Coefficients, coef_s: Coefficients) -> Tensor:
        """q, the share of the old noise's standard deviation that a step from t to s keeps; (B,) or (), in [0, 1].

        Clamped to 1 where phi grows slower than lambda (``sde_4`` above lambda 1000): the step is the ODE's there, and
        the variance stays right.
        """
        return (self.relative(_lambda(coef_s)) / self.relative(_lambda(coef_t))).clamp(max=1.0)


SDE_5 = NoiseScale("sde_5")
"""The paper's recommended function, and the default everywhere."""


def effective_eta(noise_scale: NoiseScale, coef_t: Coefficients, coef_s: Coefficients) -> Tensor:
    """The ``eta`` with which one DDIM step from t to s would be the same as this first-order step; (B,) or ().

    ``eta^2 = (1 - q^2) / (1 - lambda_s^2 / lambda_t^2)``, so 0 is the ODE and 1 is DDPM's ancestral sampling.
    """
    ratio = _lambda(coef_s) / _lambda(coef_t)
    return ((1.0 - noise_scale.kept(coef_t, coef_s) ** 2) / (1.0 - ratio**2)).sqrt()


def er_sde_step(
    prediction: Prediction,
    coef_t: Coefficients,
    coef_s: Coefficients,
    *,
    noise_scale: NoiseScale | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """First-order step from t to s < t.

    Args:
        prediction: The denoiser's prediction at the state; ``x_0`` and ``eps`` are (B, C, h, w).
        coef_t: Coefficients at t, (B,) or ().
        coef_s: Coefficients at s, (B,) or ().
        noise_scale: phi; by default ``sde_5``.
        noise: ``xi`` (B, C, h, w), standard normal; not needed for ``ode``.

    Returns:
        (B, C, h, w) state at s.

    Raises:
        ValueError: Noise is needed and not given.
    """
    noise_scale = noise_scale or NoiseScale()
    x = prediction.x_0
    mean = like(coef_s.alpha, x) * x
    if noise_scale.kind == "ode":
        return mean + like(coef_s.sigma, x) * prediction.eps
    if noise is None:
        raise ValueError(f"noise scale {noise_scale.kind} needs noise")
    kept = noise_scale.kept(coef_t, coef_s)
    fresh = (1.0 - kept**2).sqrt()
    return mean + like(coef_s.sigma * kept, x) * prediction.eps + like(coef_s.sigma * fresh, x) * noise


def er_sde(
    noise_scale: NoiseScale | None = None,
    *,
    order: int = 1,
    quadrature: Quadrature = "riemann",
    points: int = 100,
) -> Solver:
    """The ER-SDE solver for ``distill.samplers.sample``: one evaluation per step, whatever the order.

    The first step is of first order and the second of second at most, as there is no history yet; a step that lands on
    the clean end is of first order. Higher order helps with mild noise; with ``reverse_sde`` the third can be worse.

    Args:
        noise_scale: phi; by default ``sde_5``.
        order: 1, 2 or 3.
        quadrature: How the integrals of the corrections are computed.
        points: Number of intervals; even for Simpson's rule.

    Raises:
        ValueError: An order other than 1, 2 and 3, an unknown quadrature, or a bad number of points.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"order must be 1, 2 or 3, got {order}")
    if quadrature not in get_args(Quadrature):
        raise ValueError(f"quadrature must be one of {get_args(Quadrature)}, got {quadrature!r}")
    if points < 1 or (quadrature == "simpson" and points % 2):
        raise ValueError(f"points must be positive, and even for simpson, got {points}")
    scale = noise_scale or NoiseScale()

    def integral(step: Step, weight: Callable[[Tensor], Tensor]) -> Tensor:
        return _integral(scale, _lambda(step.coef_t), _lambda(step.coef_s), weight, quadrature, points)

    def solver(step: Step) -> Tensor:
        noise = None if scale.kind == "ode" else step.draw()
        x_s = er_sde_step(step.prediction, step.coef_t, step.coef_s, noise_scale=scale, noise=noise)
        if order == 1 or step.previous is None:
            return x_s
        lam_t, lam_s = _lambda(step.coef_t), _lambda(step.coef_s)
        slope = _slope(step, step.previous)
        gain = lam_s - lam_t + integral(step, torch.ones_like)
        x_s = x_s + like(_unless_clean(step.coef_s.alpha * gain, lam_s), x_s) * slope
        if order == 2 or step.previous.previous is None:
            return x_s
        before = _slope(step.previous, step.previous.previous)
        curvature = 2.0 * (slope - before) / like(lam_t - _lambda(step.previous.previous.coef_t), x_s)
        gain = (lam_s - lam_t) ** 2 / 2.0 + integral(step, lambda lam: lam - lam_t)
        return x_s + like(_unless_clean(step.coef_s.alpha * gain, lam_s), x_s) * curvature

    return solver


def _lambda(coef: Coefficients) -> Tensor:
    return coef.sigma / coef.alpha


def _slope(step: Step, previous: Step) -> Tensor:
    """Finite difference of ``x_0`` with respect to lambda; zero where the previous step was at pure noise."""
    difference = step.prediction.x_0 - previous.prediction.x_0
    return difference / like(_lambda(step.coef_t) - _lambda(previous.coef_t), difference)


def _unless_clean(gain: Tensor, lam_s: Tensor) -> Tensor:
    return torch.where(lam_s > 0.0, gain, torch.zeros_like(gain))


def _integral(
    scale: NoiseScale,
    lam_t: Tensor,
    lam_s: Tensor,
    weight: Callable[[Tensor], Tensor],
    quadrature: Quadrature,
    points: int,
) -> Tensor:
    """``int_{lambda_s}^{lambda_t} weight(l) phi(lambda_s) / phi(l) dl``; (B,) or ().

    phi(lambda_s) stands inside, because phi alone overflows at large lambda.
    """
    lam_s = lam_s.clamp(min=_LAMBDA_MIN)
    part = torch.arange(points + 1, dtype=lam_s.dtype, device=lam_s.device) / points
    part = part.reshape(-1, *[1] * lam_s.ndim)  # (points + 1, B)

    def integrand(lam: Tensor) -> Tensor:
        return weight(lam) * (lam_s / lam) * (scale.relative(lam_s) / scale.relative(lam))

    if quadrature == "riemann":
        values = integrand(lam_s + part[:-1] * (lam_t - lam_s))
        return values.sum(0) * (lam_t - lam_s) / points
    length = (lam_t / lam_s).log()
    lam = lam_s * (part * length).exp()
    values = integrand(lam) * lam
    total = values[0] + values[-1] + 4.0 * values[1:-1:2].sum(0) + 2.0 * values[2:-1:2].sum(0)
    return total * length / (3.0 * points)
