"""Tables of betas behind variance-preserving schedules, in float64."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]

_MAX_BETA = 0.999  # cap of the cosine schedule near its end (arXiv 2102.09672, section 3.2)


def make_betas(name: BetaSchedule, num_steps: int, *, beta_start: float, beta_end: float) -> Tensor:
    """Betas of a named schedule.

    Args:
        name: ``linear`` (arXiv 2006.11239), ``scaled_linear`` (linear in sqrt(beta), arXiv 2112.10752) or
            ``squaredcos_cap_v2`` (cosine, arXiv 2102.09672, eq. 17; ignores both ends).
        num_steps: T.
        beta_start: First beta.
        beta_end: Last beta.

    Returns:
        (T,) float64.

    Raises:
        ValueError: Unknown name or a non-positive number of steps.
    """
    if num_steps < 1:
        raise ValueError(f"num_train_timesteps must be >= 1, got {num_steps}")
    if name == "linear":
        return torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float64)
    if name == "scaled_linear":
        return torch.linspace(math.sqrt(beta_start), math.sqrt(beta_end), num_steps, dtype=torch.float64) ** 2
    if name == "squaredcos_cap_v2":
        time = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
        abar = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1.0 - abar[1:] / abar[:-1]).clamp(max=_MAX_BETA)
    raise ValueError(f"beta_schedule must be one of {get_args(BetaSchedule)}, got {name!r}")


def alphas_cumprod_from_betas(betas: Tensor) -> Tensor:
    """``abar_t = prod_{i<=t} (1 - beta_i)``, (T,) to (T,).

    Raises:
        ValueError: The table is not one-dimensional, is empty, or leaves (0, 1].
    """
    if betas.ndim != 1 or not len(betas):
        raise ValueError(f"betas must be a non-empty one-dimensional table, got shape {tuple(betas.shape)}")
    if not bool(((betas > 0) & (betas <= 1)).all()):
        raise ValueError(f"betas must lie in (0, 1], got {betas.min().item()} to {betas.max().item()}")
    return torch.cumprod(1.0 - betas, dim=0)


def rescale_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and scale ``sqrt(abar)`` so that its first value stays and its last is 0; (T,) to (T,).

    Source: arXiv 2305.08891, Algorithm 1.
    """
    root = alphas_cumprod.sqrt()
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
