"""The interface of noise schedules; ``distill.schedules`` holds the implementations and is what to import."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from distill.parameterization import Coefficients, diffuse


def working_dtype(device: torch.device) -> torch.dtype:
    """Float type for coefficients on a device: float64 wherever it exists (Apple's GPUs have none)."""
    return torch.float32 if device.type == "mps" else torch.float64


class NoiseSchedule(ABC):
    """Map from network time ``t`` to coefficients, and back from the noise-to-signal ratio.

    Attributes:
        num_train_timesteps: T, the number of time steps the network was trained with (1000 almost everywhere).
    """

    num_train_timesteps: int

    @property
    @abstractmethod
    def clean_t(self) -> float:
        """The time at which a state is exactly ``x_0`` (alpha 1, sigma 0)."""

    @property
    @abstractmethod
    def terminal_t(self) -> float:
        """The noisiest time, where sampling starts."""

    @property
    def final_t(self) -> float:
        """The time samplers land on after their last evaluation: ``clean_t`` unless a config says otherwise."""
        return self.clean_t

    @abstractmethod
    def lambda_t(self, t: Tensor | float) -> Tensor:
        """Noise-to-signal ratio ``sigma_t / alpha_t``.

        Args:
            t: Times, any shape (usually (B,)), integer or real, in [``clean_t``, ``terminal_t``].

        Returns:
            Ratios of the same shape in float64, from 0 (clean) to infinity (no signal).

        Raises:
            ValueError: A time lies outside the schedule (checked for values in CPU memory; others are clamped,
                since reading them back would stall the device).
        """

    @abstractmethod
    def t_from_lambda(self, lam: Tensor | float) -> Tensor:
        """Inverse of ``lambda_t``; ratios beyond the noisiest one give ``terminal_t``.

        Args:
            lam: Ratios, any shape, in [0, infinity].

        Returns:
            Real times of the same shape, float64.

        Raises:
            ValueError: A ratio is negative (checked for values in CPU memory).
        """

    @abstractmethod
    def coefficients(self, t: Tensor | float) -> Coefficients:
        """``alpha_t`` and ``sigma_t`` in float64, shaped like ``t``; arguments and errors as in ``lambda_t``."""

    def add_noise(self, x_0: Tensor, eps: Tensor, t: Tensor | float) -> Tensor:
        """The noisy state ``alpha_t x_0 + sigma_t eps``; x_0, eps (B, C, h, w), t (B,) or a number."""
        return diffuse(x_0, eps, self.coefficients(as_times(t, x_0.device)))

    def _checked(self, t: Tensor | float) -> Tensor:
        """``t`` as a float tensor inside the schedule's range."""
        t = as_times(t)
        if t.device.type == "cpu" and t.numel() and not bool(((t >= self.clean_t) & (t <= self.terminal_t)).all()):
            raise ValueError(f"t must lie in [{self.clean_t}, {self.terminal_t}], got {_range(t)}")
        return t.clamp(self.clean_t, self.terminal_t)


def as_times(t: Tensor | float, device: torch.device | None = None) -> Tensor:
    """A number or tensor as a float64 tensor (float32 where float64 does not exist), shape unchanged."""
    if isinstance(t, Tensor):
        return t.to(device=device or t.device, dtype=working_dtype(device or t.device))
    device = device or torch.device("cpu")
    return torch.tensor(float(t), dtype=working_dtype(device), device=device)


def checked_lambda(lam: Tensor | float) -> Tensor:
    """Ratios as a float tensor; negative ones (in CPU memory) raise ``ValueError``."""
    lam = as_times(lam)
    if lam.device.type == "cpu" and lam.numel() and not bool((lam >= 0).all()):
        raise ValueError(f"lambda must be >= 0, got {_range(lam)}")
    return lam


def _range(values: Tensor) -> str:
    """Smallest and largest value, for messages that must stay short."""
    return f"{values.min().item()} to {values.max().item()}"
