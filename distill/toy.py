"""Exact denoisers for data whose distribution is known: the yardstick for solvers and distillation methods."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.condition import Condition
from distill.denoiser import Denoiser
from distill.parameterization import Coefficients, PredictionType, flow_from_pair, like, v_from_pair
from distill.schedules import NoiseSchedule


class GaussianMixtureDenoiser(Denoiser):
    """The optimal denoiser of an isotropic Gaussian mixture, ``E[x_0 | x_t]`` in closed form.

    With components ``N(m_k, s^2 I)`` of weight ``w_k``, ``x_t`` is a mixture of
    ``N(alpha m_k, (alpha^2 s^2 + sigma^2) I)``, and the posterior mean of ``x_0`` is the responsibility-weighted mean
    of ``m_k + alpha s^2 / (alpha^2 s^2 + sigma^2) (x_t - alpha m_k)``.

    Args:
        means: (K, ...) component means, in the shape of one sample.
        std: s, the same for all components, > 0.
        schedule: Noise schedule.
        weights: (K,) component weights, normalised here; by default equal.
        prediction_type: What ``forward`` returns.

    Raises:
        ValueError: Shapes disagree or ``std`` is not positive.
    """

    means: Tensor
    log_weights: Tensor

    def __init__(
        self,
        means: Tensor,
        std: float,
        schedule: NoiseSchedule,
        *,
        weights: Tensor | None = None,
        prediction_type: PredictionType = "eps",
    ) -> None:
        super().__init__(schedule, prediction_type)
        weights = torch.ones(len(means), dtype=means.dtype) if weights is None else weights
        if weights.shape != means.shape[:1]:
            raise ValueError(f"expected {len(means)} weights, got shape {tuple(weights.shape)}")
        if not std > 0:
            raise ValueError(f"std must be > 0, got {std}")
        self.std = std
        self.register_buffer("means", means)
        self.register_buffer("log_weights", (weights / weights.sum()).log())

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Exact prediction of kind ``prediction_type``; x_t (B, ...), t (B,); the condition is not read."""
        coef = self.schedule.coefficients(t)
        x_0 = self._posterior_mean(x_t, coef)
        if self.prediction_type == "x0":
            return x_0
        eps = self._posterior_noise(x_t, x_0, coef)
        if self.prediction_type == "eps":
            return eps
        return v_from_pair(x_0, eps, coef) if self.prediction_type == "v" else flow_from_pair(x_0, eps)

    def draw(self, num_samples: int, generator: torch.Generator) -> Tensor:
        """Samples of the data distribution, (num_samples, ...)."""
        component = torch.multinomial(self.log_weights.exp(), num_samples, replacement=True, generator=generator)
        centre = self.means[component]
        return centre + self.std * torch.randn(centre.shape, generator=generator, dtype=centre.dtype)

    def transport(self, x_t: Tensor, t: float, s: float) -> Tensor:
        """The exact ODE solution from time t to time s for one component.

        The ODE keeps the standardised position: ``x_s = alpha_s m + (std_s / std_t) (x_t - alpha_t m)``.

        Raises:
            ValueError: The mixture has several components, for which no closed form exists.
        """
        if len(self.means) != 1:
            raise ValueError(f"closed-form transport needs one component, got {len(self.means)}")
        coef_t, coef_s = self.schedule.coefficients(t), self.schedule.coefficients(s)
        ratio = (self._variance(coef_s) / self._variance(coef_t)).sqrt()
        offset = x_t - like(coef_t.alpha, x_t) * self.means
        return like(coef_s.alpha, x_t) * self.means + like(ratio, x_t) * offset

    def cdf(self, x_t: Tensor, t: float) -> Tensor:
        """Cumulative distribution of ``x_t`` for one-dimensional data, (B, 1) to (B, 1).

        In one dimension the ODE cannot cross itself and keeps all marginals, so it keeps this number too: a known
        answer for trajectories of any mixture.
        """
        coef = self.schedule.coefficients(t)
        distance = x_t - like(coef.alpha, x_t) * self.means.flatten()
        normal = torch.special.ndtr(distance / like(self._variance(coef).sqrt(), x_t))
        return (normal * self.log_weights.exp()).sum(dim=1, keepdim=True)

    def _variance(self, coef: Coefficients) -> Tensor:
        return coef.alpha**2 * self.std**2 + coef.sigma**2

    def _posterior_mean(self, x_t: Tensor, coef: Coefficients) -> Tensor:
        distance = x_t[:, None] - like(coef.alpha, x_t)[:, None] * self.means  # (B, K, ...)
        variance = self._variance(coef)
        squared = distance.flatten(2).square().sum(2)  # (B, K)
        responsibility = (self.log_weights - squared / (2.0 * like(variance, squared))).softmax(1)
        gain = like(coef.alpha * self.std**2 / variance, x_t)[:, None]
        weight = responsibility.reshape(*responsibility.shape, *[1] * (x_t.ndim - 1))
        return (weight * (self.means + gain * distance)).sum(1)

    def _posterior_noise(self, x_t: Tensor, x_0: Tensor, coef: Coefficients) -> Tensor:
        """``(x_t - alpha x_0) / sigma``, which vanishes together with sigma."""
        sigma = like(coef.sigma, x_t)
        difference = x_t - like(coef.alpha, x_t) * x_0
        return torch.where(sigma > 0, difference / sigma.clamp(min=torch.finfo(sigma.dtype).tiny), 0.0)
