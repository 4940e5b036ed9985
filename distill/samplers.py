"""Samplers: loops over solver steps, as functions ``(denoiser, x_T, times, condition) -> x_0``.

``times`` are the N times at which the network is evaluated, noisiest first, as diffusers lists them
(``distill.timesteps.timesteps`` makes them); after the last evaluation a sampler lands on ``schedule.final_t``.
Randomness comes only from the generator passed in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distill.denoiser import Condition, Denoiser, Prediction
from distill.noise import Generators, gaussian_like
from distill.parameterization import Coefficients, like
from distill.schedules import working_dtype
from distill.solvers import ddim_step, dpmpp_2m_step, euler_step, heun_step
from distill.timesteps import Spacing, timesteps, timesteps_from_config

__all__ = [
    "Solver",
    "Spacing",
    "Step",
    "ddim",
    "ddim_eta",
    "dpmpp_2m",
    "euler",
    "heun",
    "lcm_boundary",
    "renoise_sample",
    "sample",
    "timesteps",
    "timesteps_from_config",
]


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """Everything known when a solver moves from ``t`` to ``s``."""

    index: int  # 0-based number of the evaluation
    t: Tensor  # (B,) time of x_t
    s: Tensor  # (B,) time to move to
    x_t: Tensor  # (B, C, h, w)
    prediction: Prediction  # at x_t
    coef_t: Coefficients  # (B,)
    coef_s: Coefficients  # (B,)
    lands_clean: bool  # whether s is the clean end (for any sample), where no noise is left to predict
    previous: Step | None  # the step before; it knows its own predecessor, which knows none
    evaluate: Callable[[Tensor, Tensor], Prediction]  # (x, t) -> prediction under the same condition
    draw: Callable[[], Tensor]  # fresh standard normal noise like x_t


Solver = Callable[[Step], Tensor]
"""A rule for one step: returns the state at ``step.s``."""

Callback = Callable[[Step, Tensor], None]
"""Called after every step with the step and the new state."""

Boundary = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Consistency boundary: times (B,) to ``(c_skip, c_out)``, each (B,)."""


def ddim(step: Step) -> Tensor:
    """Deterministic DDIM, first order, one evaluation per step."""
    return ddim_step(step.x_t, step.prediction, step.coef_t, step.coef_s)


def ddim_eta(eta: float) -> Solver:
    """DDIM with noise; ``eta = 1`` is DDPM's ancestral sampling."""

    def solver(step: Step) -> Tensor:
        noise = step.draw() if eta > 0.0 else None
        return ddim_step(step.x_t, step.prediction, step.coef_t, step.coef_s, eta=eta, noise=noise)

    return solver


def euler(step: Step) -> Tensor:
    """Euler on the straight path, first order, one evaluation per step."""
    return euler_step(step.x_t, step.prediction, step.coef_t, step.coef_s)


def heun(step: Step) -> Tensor:
    """Heun, second order, two evaluations per step but for one that lands on the clean end, which is Euler's."""
    x_s = euler(step)
    if step.lands_clean:
        return x_s
    return heun_step(step.x_t, step.prediction, step.evaluate(x_s, step.s), step.coef_t, step.coef_s)


def dpmpp_2m(step: Step) -> Tensor:
    """DPM-Solver++(2M), second order, one evaluation per step; the first step, and one that lands clean, are DDIM's."""
    if step.previous is None or step.lands_clean:
        return ddim(step)
    return dpmpp_2m_step(
        step.x_t,
        step.prediction,
        step.coef_t,
        step.coef_s,
        previous=step.previous.prediction,
        coef_previous=step.previous.coef_t,
    )


def sample(
    denoiser: Denoiser,
    x_T: Tensor,
    times: Tensor,
    condition: Condition,
    *,
    solver: Solver = ddim,
    final_t: float | None = None,
    targets: Tensor | None = None,
    generator: Generators | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Integrate from ``times[0]`` down to the end of the schedule.

    Runs with gradients if they are enabled; wrap in ``torch.no_grad()`` for inference.

    Args:
        denoiser: The network, guided or not.
        x_T: (B, C, h, w) state at ``times[0]``, usually pure noise.
        times: (N,) or (N, B) evaluation times, strictly decreasing.
        condition: Conditioning of batch size B (or 1).
        solver: ``ddim``, ``euler``, ``heun``, ``dpmpp_2m``, ``ddim_eta(eta)`` or any ``Solver``.
        final_t: Where to land after the last evaluation; by default ``schedule.final_t``.
        targets: (N,) or (N, B) times each step moves to, where they are not the next evaluation time. diffusers'
            DDIMScheduler moves by ``T // N`` even where its ``timesteps`` do not (``linspace`` spacing, and
            ``trailing`` when N does not divide T); ``ddim_targets`` gives its times for exact parity.
        generator: Noise source for stochastic solvers.
        callback: Called with each ``Step`` and its result.

    Returns:
        (B, C, h, w) state at the final time.

    Raises:
        ValueError: Bad ``times`` or ``targets``, or a stochastic solver without generator.
    """
    times = _check_times(times, x_T)
    if targets is not None and final_t is not None:
        raise ValueError("give final_t or targets, not both")
    if targets is None:
        last = torch.full_like(times[:1], denoiser.schedule.final_t if final_t is None else final_t)
        targets = torch.cat([times[1:], last])
    targets = targets.to(times)
    if targets.shape != times.shape:
        raise ValueError(f"targets must have the shape of times {tuple(times.shape)}, got {tuple(targets.shape)}")
    clean = [bool(row.any()) for row in (targets <= denoiser.schedule.clean_t).reshape(len(times), -1).cpu()]
    condition = condition.expand(x_T.shape[0])
    x, previous = x_T, None
    for index in range(len(times)):
        step = _make_step(denoiser, x, times, targets, index, clean[index], condition, previous, generator)
        x = solver(step)
        if callback is not None:
            callback(step, x)
        previous = step
    return x


def renoise_sample(
    denoiser: Denoiser,
    x_T: Tensor,
    times: Tensor,
    condition: Condition,
    *,
    generator: Generators | None = None,
    boundary: Boundary | None = None,
) -> Tensor:
    """Multistep consistency sampling: predict ``x_0``, add fresh noise for the next time, repeat.

    The last ``x_0`` is the result. This is the sampler of LCM (arXiv 2310.04378, Algorithm 3), of TLCM and MLCM
    (arXiv 2406.05768) and of Layton's decoder, which uses ``times = [999, 499, 124]``.
    TLCM uses no boundary; LCM uses ``lcm_boundary``, whose weights differ from (0, 1) by less than 0.3 % from t = 1 on.

    Args:
        denoiser: The distilled network.
        x_T: (B, C, h, w) pure noise.
        times: (N,) or (N, B) evaluation times, strictly decreasing.
        condition: Conditioning of batch size B (or 1).
        generator: Noise source, one or one per sample; needed when N > 1.
        boundary: Gives ``(c_skip, c_out)`` for ``x_0 = c_skip x_t + c_out x_0_hat``.

    Returns:
        (B, C, h, w) clean latent.

    Raises:
        ValueError: Bad ``times``, or several of them without a generator.
    """
    times = _check_times(times, x_T)
    if len(times) > 1 and generator is None:
        raise ValueError(f"{len(times)} steps draw fresh noise and need a generator")
    condition = condition.expand(x_T.shape[0])
    x, x_0 = x_T, x_T
    for index in range(len(times)):
        t = times[index].expand(x_T.shape[0])
        x_0 = denoiser.predict(x, t, condition).x_0
        if boundary is not None:
            c_skip, c_out = boundary(t)
            x_0 = like(c_skip, x) * x + like(c_out, x) * x_0
        if index + 1 < len(times) and generator is not None:
            x = denoiser.schedule.add_noise(x_0, gaussian_like(x_0, generator), times[index + 1].expand(x_T.shape[0]))
    return x_0


def lcm_boundary(t: Tensor, *, sigma_data: float = 0.5, timestep_scaling: float = 10.0) -> tuple[Tensor, Tensor]:
    """``c_skip`` and ``c_out`` of LCM and of diffusers' LCMScheduler: the identity at t = 0.

    Args:
        t: (B,) times.
        sigma_data: Half-width of the boundary (arXiv 2303.01469, appendix C).
        timestep_scaling: Factor on t before the formula.

    Returns:
        Two (B,) tensors.
    """
    scaled = t * timestep_scaling
    total = scaled**2 + sigma_data**2
    return sigma_data**2 / total, scaled / total.sqrt()


def _make_step(
    denoiser: Denoiser,
    x: Tensor,
    times: Tensor,
    targets: Tensor,
    index: int,
    lands_clean: bool,
    condition: Condition,
    previous: Step | None,
    generator: Generators | None,
) -> Step:
    def evaluate(state: Tensor, t: Tensor) -> Prediction:
        return denoiser.predict(state, t, condition)

    def draw() -> Tensor:
        if generator is None:
            raise ValueError("this solver draws noise and needs a generator")
        return gaussian_like(x, generator)

    t, s = times[index].expand(x.shape[0]), targets[index].expand(x.shape[0])
    return Step(
        index=index,
        t=t,
        s=s,
        x_t=x,
        prediction=evaluate(x, t),
        coef_t=denoiser.schedule.coefficients(t),
        coef_s=denoiser.schedule.coefficients(s),
        lands_clean=lands_clean,
        previous=None if previous is None else _without_history(previous),
        evaluate=evaluate,
        draw=draw,
    )


def _without_history(step: Step) -> Step:
    """The step with one predecessor: third-order solvers need two steps, and a whole chain would hold every state."""
    before = step.previous
    return replace(step, previous=None if before is None else replace(before, previous=None))


def _check_times(times: Tensor, x_T: Tensor) -> Tensor:
    """Times on the state's device in working precision, refused if empty, mis-shaped or not decreasing."""
    if times.ndim not in (1, 2) or not len(times):
        raise ValueError(f"times must be (N,) or (N, B) with N >= 1, got shape {tuple(times.shape)}")
    if times.ndim == 2 and times.shape[1] != x_T.shape[0]:
        raise ValueError(f"times (N, B) must have B = {x_T.shape[0]}, got shape {tuple(times.shape)}")
    if times.device.type == "cpu" and not bool((times[1:] < times[:-1]).all()):
        raise ValueError(f"times must decrease strictly, got {times.tolist()}")
    # The cast comes first: a device without float64 must not be handed any.
    return times.to(working_dtype(x_T.device)).to(x_T.device)
