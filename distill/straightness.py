"""How straight a flow is: ``S(Z) = int_0^1 E |(Z_1 - Z_0) - v(Z_s, s)|^2 ds`` (InstaFlow, arXiv 2309.06380, eq. 6).

Zero if and only if every trajectory is a straight line, and one Euler step is then exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.condition import Condition
from distill.denoiser import Denoiser, RescheduledDenoiser
from distill.schedules import FlowSchedule


@dataclass(frozen=True, slots=True, eq=False)
class Straightness:
    """An estimate of S(Z), averaged over dimensions so that it does not depend on the size of the latent."""

    per_sample: Tensor  # (B,) mean over steps
    per_step: Tensor  # (N,) mean over samples, from noise to image

    @property
    def mean(self) -> float:
        """S(Z)."""
        return float(self.per_sample.mean())

    @property
    def standard_error(self) -> float:
        """Standard error of ``mean`` over samples; NaN for one sample."""
        return float(self.per_sample.std() / len(self.per_sample) ** 0.5)


def as_flow(denoiser: Denoiser) -> Denoiser:
    """Any denoiser as a rectified flow on the clock 0..1000, exactly (`distill.denoiser.RescheduledDenoiser`)."""
    if isinstance(denoiser.schedule, FlowSchedule):
        return denoiser
    return RescheduledDenoiser(denoiser, FlowSchedule(), "flow")


@torch.no_grad()
def straightness(
    denoiser: Denoiser, noise: Tensor, condition: Condition, *, num_steps: int = 25, start_s: float = 0.0
) -> Straightness:
    """Estimate S(Z) along N-step Euler trajectories.

    Models of other schedules are seen as flows. Where such a schedule ends before pure noise (Stable Diffusion: flow
    time s = 0.064) its velocity is not known below, and what a flow view makes of it there is an extrapolation:
    ``start_s`` begins the trajectories later, for a fair comparison of two models use the same for both.

    Args:
        denoiser: The model; under guidance if its guided field is meant (`distill.denoiser.GuidedDenoiser`).
        noise: (B, C, h, w) standard normal: what a sampler begins with.
        condition: Of batch size B or 1.
        num_steps: N; the paper's figure uses 25 and more.
        start_s: Flow time at which trajectories start, in [0, 1).

    Returns:
        The estimate, per sample and per step.

    Raises:
        ValueError: ``num_steps`` is below 2 (one step is always straight), or ``start_s`` is outside [0, 1).
    """
    if num_steps < 2:
        raise ValueError(f"num_steps must be >= 2, got {num_steps}")
    if not 0 <= start_s < 1:
        raise ValueError(f"start_s must lie in [0, 1), got {start_s}")
    flow = as_flow(denoiser)
    clock = flow.schedule.terminal_t
    length = (1.0 - start_s) / num_steps
    # A sampler begins with x = noise, and Z = x / (alpha + sigma), where alpha^2 + sigma^2 = 1.
    z, velocities = noise * (start_s**2 + (1.0 - start_s) ** 2) ** 0.5, []
    for index in range(num_steps):
        s = start_s + index * length
        # predict().flow is dZ/dsigma; the papers' velocity dZ/ds is its negative
        velocity = -flow.predict(z, clock * (1.0 - s), condition).flow
        velocities.append(velocity)
        z = z + length * velocity
    # the chord per unit of time is the mean velocity
    chord = torch.stack(velocities).mean(dim=0)
    squared = torch.stack([(chord - velocity).flatten(1).square().mean(dim=1) for velocity in velocities])  # (N, B)
    return Straightness(per_sample=squared.mean(dim=0), per_step=squared.mean(dim=1))
