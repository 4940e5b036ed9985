"""What consistency distillation methods share: the consistency function, its distances, its times, its settings.

A consistency function maps every state of a trajectory to the trajectory's clean end (arXiv 2303.01469). Distillation
teaches it by agreement of two neighbouring states, the second reached from the first by the teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from einops import reduce
from torch import Tensor

from distill.denoiser import Condition, Denoiser, Prediction
from distill.method import DistillationMethod, DistillBatch, Networks
from distill.moves import guide, move
from distill.noise import gaussian_like
from distill.parameterization import like
from distill.samplers import Solver, lcm_boundary
from distill.schedules import FlowSchedule, NoiseSchedule, VPSchedule, as_times

BoundaryKind = Literal["lcm", "none"]
"""``lcm``: c_skip and c_out of LCM, the identity at t = 0; ``none``: the network's ``x_0`` as it is (TLCM)."""

DistanceKind = Literal["pseudo_huber", "l2"]

HUBER_C = 0.001
"""Width of the pseudo-Huber distance in the LCM scripts."""


@dataclass(frozen=True, slots=True, eq=False)
class ConsistencyFunction:
    """``f(x_t, t) = c_skip x_t + c_out x_0_hat(x_t, t)``: the clean end of the trajectory through ``x_t``.

    Attributes:
        denoiser: Any kind of prediction, any schedule.
        boundary: See ``BoundaryKind``.
    """

    denoiser: Denoiser
    boundary: BoundaryKind = "lcm"

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """``f`` (B, C, h, w) of states (B, C, h, w) at times (B,)."""
        return self.read(self.denoiser.predict(x_t, t, condition), x_t, t)

    def read(self, prediction: Prediction, x_t: Tensor, t: Tensor) -> Tensor:
        """``f`` (B, C, h, w) from a prediction made at ``x_t`` already."""
        if self.boundary == "none":
            return prediction.x_0
        c_skip, c_out = lcm_boundary(t)
        return like(c_skip, x_t) * x_t + like(c_out, x_t) * prediction.x_0


def distance(
    found: Tensor,
    wanted: Tensor,
    kind: DistanceKind = "pseudo_huber",
    *,
    c: float = HUBER_C,
    weight: Tensor | None = None,
) -> Tensor:
    """Mean distance of two batches, computed in float32 at least.

    ``l2`` is the mean of ``d^2``; ``pseudo_huber`` that of ``sqrt(d^2 + c^2) - c`` (arXiv 2310.14189; elementwise, as
    in the LCM scripts), written without the cancellation: exactly 0 for equal batches.

    Args:
        found: (B, ...).
        wanted: (B, ...); pass it detached.
        kind: Which distance.
        c: Width of the quadratic part of ``pseudo_huber``.
        weight: (B,) factor per sample, averaged as it is; by default 1.

    Returns:
        ().

    Raises:
        ValueError: Unknown kind.
    """
    difference = found.to(torch.promote_types(found.dtype, torch.float32)) - wanted
    squared = difference.square()
    if kind == "pseudo_huber":
        squared = squared / ((squared + c * c).sqrt() + c)
    elif kind != "l2":
        raise ValueError(f"distance must be one of {get_args(DistanceKind)}, got {kind!r}")
    per_sample: Tensor = reduce(squared, "b ... -> b", "mean")
    return per_sample.mean() if weight is None else (weight.to(per_sample) * per_sample).mean()


def forget_casts() -> None:
    """Drop what autocast remembers of weights that were cast without gradient, before the student is evaluated.

    Older versions of torch (before pytorch #165068) hand such casts to the next evaluation, which then has no gradient.
    """
    torch.clear_autocast_cache()


def grid(schedule: NoiseSchedule, num_points: int = 50) -> Tensor:
    """Equally spaced training times, ascending, the last one noisiest; before a flow schedule's shift.

    On a table of 1000 rows and 50 points: 19, 39, ..., 999 (LCM's and diffusers' LCMScheduler's). On a flow: 20, ...,
    1000, so that pure noise is a training time there too.

    Returns:
        (num_points,) float64.

    Raises:
        ValueError: More points than training times, or none.
    """
    total = schedule.num_train_timesteps
    if not 1 <= num_points <= total:
        raise ValueError(f"the grid must have 1 to {total} points, got {num_points}")
    points = torch.arange(1, num_points + 1, dtype=torch.float64) * (total // num_points)
    return points if isinstance(schedule, FlowSchedule) else points - 1.0


def on_clock(schedule: NoiseSchedule, times: Tensor) -> Tensor:
    """Grid times as the network's times: shifted on a flow schedule (SD3, FLUX), unchanged elsewhere."""
    return schedule.shift_t(times) if isinstance(schedule, FlowSchedule) else times


def inference_grid(schedule: NoiseSchedule, num_steps: int, num_points: int = 50) -> Tensor:
    """Times of ``num_steps`` evaluations: every ``num_points / num_steps``-th of the descending grid, rounded down.

    Equal to ``timesteps`` of diffusers' LCMScheduler with ``original_inference_steps = num_points``.

    Returns:
        (num_steps,) float64, noisiest first.

    Raises:
        ValueError: More steps than grid points, or none.
    """
    if not 1 <= num_steps <= num_points:
        raise ValueError(f"num_steps must lie in [1, {num_points}], got {num_steps}")
    descending = grid(schedule, num_points).flip(0)
    indices = torch.arange(num_steps, dtype=torch.float64) * (num_points / num_steps)
    return on_clock(schedule, descending[indices.floor().long()])


def draw_pair(
    schedule: NoiseSchedule, batch_size: int, generator: torch.Generator, *, num_points: int, skip: float
) -> tuple[Tensor, Tensor]:
    """Start times drawn uniformly from the grid, and the times ``skip`` below them, not below 0.

    Returns:
        t and s, each (B,) float64 where the generator is, s < t.

    Raises:
        ValueError: ``skip`` is not positive.
    """
    if not skip > 0:
        raise ValueError(f"skip must be > 0, got {skip}")
    points = grid(schedule, num_points)
    points = points[points > 0].to(generator.device)  # nothing lies below 0
    start = points[torch.randint(len(points), (batch_size,), generator=generator, device=generator.device)]
    return on_clock(schedule, start), on_clock(schedule, (start - skip).clamp(min=0.0))


def draw_guidance(guidance_range: tuple[float, float], batch_size: int, generator: torch.Generator) -> float | Tensor:
    """Guidance scales drawn uniformly, (B,) where the generator is; a range of one point gives that number."""
    low, high = guidance_range
    if low == high:
        return low
    return low + (high - low) * torch.rand(batch_size, generator=generator, device=generator.device)


def with_guidance(condition: Condition, scale: float | Tensor, like_x: Tensor) -> Condition:
    """The condition of a student that is told the guidance scale (LCM's w-conditioning), (B,) float32."""
    value = torch.as_tensor(scale, dtype=torch.float32, device=like_x.device).expand(len(like_x))
    return replace(condition, guidance=value)


@dataclass(frozen=True, slots=True)
class ConsistencySettings:
    """How pairs of neighbouring states are made and compared.

    Attributes:
        num_points: Points of the grid of start times.
        skip: How far the teacher moves, on the network's clock (before a flow schedule's shift).
        num_sub_steps: Solver steps of that move, h.
        guidance_range: Guidance scales of the teacher, drawn uniformly; diffusers' convention (1 is the plain teacher),
            so LCM's w in [2, 14] is (3, 15). Equal ends fix the scale; (1, 1) does without guidance.
        condition_on_guidance: Tell student and target the scale (networks with ``time_cond_proj_dim``).
        distance: See ``distance``.
        boundary: See ``BoundaryKind``.
        with_teacher: If not, the second state is the same latent under less of the same noise (latent consistency
            fine-tuning, arXiv 2310.04378, section 4.4): nothing is guided then.

    Raises:
        ValueError: A value out of range.
    """

    num_points: int = 50
    skip: float = 20.0
    num_sub_steps: int = 1
    guidance_range: tuple[float, float] = (3.0, 15.0)
    condition_on_guidance: bool = False
    distance: DistanceKind = "pseudo_huber"
    boundary: BoundaryKind = "lcm"
    with_teacher: bool = True

    def __post_init__(self) -> None:
        if not self.skip > 0 or self.num_sub_steps < 1 or self.num_points < 1:
            numbers = (self.num_points, self.skip, self.num_sub_steps)
            raise ValueError(f"num_points, skip and num_sub_steps must be positive, got {numbers}")
        if not 1.0 <= self.guidance_range[0] <= self.guidance_range[1]:
            raise ValueError(f"guidance_range must be (low, high) with 1 <= low <= high, got {self.guidance_range}")
        if self.distance not in get_args(DistanceKind):
            raise ValueError(f"distance must be one of {get_args(DistanceKind)}, got {self.distance!r}")
        if self.boundary not in get_args(BoundaryKind):
            raise ValueError(f"boundary must be one of {get_args(BoundaryKind)}, got {self.boundary!r}")


@dataclass(frozen=True, slots=True, eq=False)
class Agreement:
    """Two answers that should agree."""

    t: Tensor  # (B,) times of the student's states
    found: Tensor  # (B, C, h, w) the student's f(x_t, t), with gradients
    wanted: Tensor  # (B, C, h, w) the target's f(x_s, s), without


class ConsistencyMethod(DistillationMethod):
    """Base of LCM and SCott: noised latents, one guided move of the teacher, agreement of student and target.

    Args:
        settings: See ``ConsistencySettings``.
        solver: The teacher's solver.
        target_decay: Decay of the averaged target; None: the student is its own target (LoRA).
        schedule: The student's schedule, which ``inference_times`` needs; by default Stable Diffusion's. Only its kind,
            length and shift matter here.
        step_counts: Numbers of steps to offer.
    """

    needs_latents = True

    def __init__(
        self,
        settings: ConsistencySettings,
        solver: Solver,
        *,
        target_decay: float | None,
        schedule: NoiseSchedule | None,
        step_counts: Sequence[int],
    ) -> None:
        super().__init__()
        self.settings = settings
        self.solver = solver
        self.target_decay = target_decay
        self.schedule: NoiseSchedule = schedule or VPSchedule()
        self.needs_null = settings.with_teacher and settings.guidance_range[1] > 1.0
        self._step_counts = tuple(step_counts)

    @property
    def step_counts(self) -> tuple[int, ...]:
        """See ``DistillationMethod.step_counts``."""
        return self._step_counts

    def inference_times(self, num_steps: int) -> Tensor:
        """Times of diffusers' LCMScheduler, (num_steps,); see ``DistillationMethod.inference_times``."""
        if num_steps not in self._step_counts:
            raise ValueError(f"this student is trained for {self._step_counts} steps, not {num_steps}")
        return inference_grid(self.schedule, num_steps, self.settings.num_points)

    def agree(self, networks: Networks, batch: DistillBatch, generator: torch.Generator) -> Agreement:
        """Noise the latents, move the teacher, and ask student and target for the clean end.

        Raises:
            ValueError: No latents, no null condition where guidance needs one, or another schedule than declared.
        """
        settings, schedule = self.settings, networks.student.schedule
        if batch.x_0 is None:
            raise ValueError(f"{type(self).__name__} is trained on latents of images: the batch needs x_0")
        self._check_schedule(schedule)
        x_0, size = batch.x_0, batch.batch_size
        t, s = draw_pair(schedule, size, generator, num_points=settings.num_points, skip=settings.skip)
        t, s = as_times(t, x_0.device), as_times(s, x_0.device)
        scale = draw_guidance(settings.guidance_range, size, generator)
        noise = gaussian_like(x_0, generator)
        x_t = schedule.add_noise(x_0, noise, t)
        if settings.with_teacher:
            x_s = move(
                guide(networks.teacher, scale, batch.null),
                x_t,
                t,
                s,
                batch.condition,
                num_steps=settings.num_sub_steps,
                solver=self.solver,
                generator=generator,
            )
        else:
            x_s = schedule.add_noise(x_0, noise, s)
        condition = with_guidance(batch.condition, scale, x_0) if settings.condition_on_guidance else batch.condition
        # The student comes last: what it keeps for the backward pass then never lies beside another evaluation.
        with torch.no_grad():
            wanted = ConsistencyFunction(networks.target, settings.boundary)(x_s, s, condition)
        forget_casts()
        found = ConsistencyFunction(networks.student, settings.boundary)(x_t, t, condition)
        return Agreement(t, found, wanted)

    def _check_schedule(self, schedule: NoiseSchedule) -> None:
        """The times promised for inference must be the trained network's own."""
        if schedule is self.schedule:
            return
        own, theirs = (on_clock(one, grid(one)) for one in (self.schedule, schedule))
        if own.shape != theirs.shape or not torch.equal(own, theirs):
            raise ValueError(
                f"this method was made for a {type(self.schedule).__name__} and the student has a "
                f"{type(schedule).__name__} with other times: give it schedule=student.schedule"
            )
