"""Which times a sampler evaluates the network at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from distill._config import read_bool, read_int, read_str
from distill.schedules import FlowSchedule, NoiseSchedule, dynamic_shift

Spacing = Literal["leading", "trailing", "linspace"]

_UNSUPPORTED = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "shift_terminal")


def timesteps(
    schedule: NoiseSchedule,
    num_steps: int,
    spacing: Spacing | None = None,
    *,
    steps_offset: int = 0,
) -> Tensor:
    """Evaluation times, noisiest first, equal to those of diffusers' schedulers.

    For a variance-preserving schedule (names of arXiv 2305.08891, Table 2), T = 1000 and N = 50:

    * ``leading`` (default): 980, 960, ..., 0, plus ``steps_offset`` (1 in Stable Diffusion's files); never pure noise.
    * ``trailing``: 999, 979, ..., 19; starts at pure noise.
    * ``linspace``: 999, ..., 0, both ends included, rounded.

    For rectified flow, before the schedule's shift, T = 1000:

    * ``trailing``: 1000 (1 - i / N), as InstaFlow and FLUX.
    * ``linspace`` (default): from 1000 to the shifted time 1, as FlowMatchEulerDiscreteScheduler without custom sigmas
      (SD3). It applies the shift to that lower end twice, and so does this, for parity.

    Args:
        schedule: The denoiser's schedule.
        num_steps: N.
        spacing: See above.
        steps_offset: Added to ``leading`` times.

    Returns:
        (N,) float64, strictly decreasing.

    Raises:
        ValueError: More steps than training times or fewer than one, an unknown spacing, ``leading`` for a flow, or
            an offset where it has no effect.
    """
    total = schedule.num_train_timesteps
    if not 1 <= num_steps <= total:
        raise ValueError(f"num_steps must lie in [1, {total}], got {num_steps}")
    if spacing is not None and spacing not in get_args(Spacing):
        raise ValueError(f"spacing must be one of {get_args(Spacing)}, got {spacing!r}")
    if isinstance(schedule, FlowSchedule):
        if steps_offset:
            raise ValueError(f"steps_offset has no effect on a flow schedule, got {steps_offset}")
        return _flow_times(schedule, num_steps, spacing or "linspace")
    spacing = spacing or "leading"
    if steps_offset and spacing != "leading":
        raise ValueError(f"steps_offset only applies to leading spacing, got {steps_offset} with {spacing}")
    steps = torch.arange(num_steps, dtype=torch.float64)
    if spacing == "leading":
        return (steps * (total // num_steps)).flip(0) + steps_offset
    if spacing == "trailing":
        return (total - steps * (total / num_steps)).round() - 1.0
    return torch.linspace(0, total - 1, num_steps, dtype=torch.float64).round().flip(0)


def uniform_flow_times(schedule: NoiseSchedule, num_steps: int) -> Tensor:
    """Times (N,) float64 that divide the flow time from the schedule's noisy end to the image equally.

    Raises:
        ValueError: So many steps are closer to each other than the schedule's whole times.
    """
    if isinstance(schedule, FlowSchedule):
        return timesteps(FlowSchedule(schedule.num_train_timesteps), num_steps, "trailing")
    start = 1.0 / (1.0 + schedule.lambda_t(schedule.terminal_t))
    s = start + (1.0 - start) * torch.arange(num_steps, dtype=torch.float64) / num_steps
    times = schedule.t_from_lambda((1.0 - s) / s).round()
    times[0] = schedule.terminal_t
    if bool((times.diff() >= 0).any()) or float(times[-1]) < 0:
        raise ValueError(f"{num_steps} equal steps of the flow time share times of this schedule: take fewer")
    return times


def timesteps_from_config(
    schedule: NoiseSchedule, num_steps: int, config: Mapping[str, object], *, num_tokens: int | None = None
) -> Tensor:
    """Evaluation times as a diffusers scheduler configuration asks for them, by the scheduler's ``set_timesteps(N)``.

    Pipelines may hand over sigmas of their own: those of FLUX do, and without dynamic shifting (schnell) these are
    ``timesteps(schedule, N, "trailing")``.

    Args:
        schedule: The schedule made from the same configuration.
        num_steps: N.
        config: ``pipe.scheduler.config``.
        num_tokens: Number of latent tokens (FLUX: ``h w / 4``), for configurations with ``use_dynamic_shifting``.

    Returns:
        (N,) float64.

    Raises:
        ValueError: The configuration asks for something not supported, or for ``num_tokens``.
    """
    for key in _UNSUPPORTED:
        if config.get(key):
            raise ValueError(f"{key}={config[key]!r} is not supported")
    if not isinstance(schedule, FlowSchedule):
        spacing = read_str(config, "timestep_spacing", "leading")
        # diffusers reads the offset for leading spacing only, and its files carry it with others too.
        offset = read_int(config, "steps_offset", 0) if spacing == "leading" else 0
        return timesteps(schedule, num_steps, spacing, steps_offset=offset)  # type: ignore[arg-type]  # checked there
    if not read_bool(config, "use_dynamic_shifting", False):
        return timesteps(schedule, num_steps)
    if num_tokens is None:
        raise ValueError("use_dynamic_shifting needs num_tokens")
    shifted = FlowSchedule(schedule.num_train_timesteps, shift=dynamic_shift(config, num_tokens))
    return timesteps(shifted, num_steps, "trailing")


def ddim_targets(schedule: NoiseSchedule, times: Tensor) -> Tensor:
    """Where diffusers' DDIMScheduler moves from each time: ``t - T // N``, or ``final_t`` below zero.

    Equal to the next time for ``leading`` spacing; see ``samplers.sample``. Shapes (N,) to (N,).
    """
    moved = times - schedule.num_train_timesteps // len(times)
    return torch.where(moved < 0, torch.full_like(moved, schedule.final_t), moved)


def _flow_times(schedule: FlowSchedule, num_steps: int, spacing: Spacing) -> Tensor:
    total = schedule.num_train_timesteps
    if spacing == "leading":
        raise ValueError("leading spacing never starts at pure noise, which a flow must; use trailing or linspace")
    if spacing == "trailing":
        return schedule.shift_t(total - torch.arange(num_steps, dtype=torch.float64) * (total / num_steps))
    first = float(schedule.shift_t(1.0))
    return schedule.shift_t(torch.linspace(total, first, num_steps, dtype=torch.float64))
