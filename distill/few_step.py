"""How a distilled network is to be sampled: saved beside its weights and enforced when it is used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from distill.condition import Condition
from distill.denoiser import Denoiser
from distill.noise import Generators
from distill.parameterization import PREDICTION_TYPES, PredictionType, like
from distill.samplers import Solver, Step, ddim, lcm_boundary, renoise_sample
from distill.samplers import sample as sample_with_solver
from distill.schedules import NoiseSchedule

if TYPE_CHECKING:
    from distill.method import DistillationMethod

Kind = Literal["renoise", "ddim", "tcd"]
BoundaryKind = Literal["none", "lcm"]
Start = Literal["noise", "image"]


@dataclass(frozen=True, slots=True)
class FewStepSampling:
    """The ways of sampling that a student was trained for.

    Attributes:
        times: For each number of steps the times of its evaluations on the network's clock, noisiest first.
        kind: What follows a prediction of ``x_0``: fresh noise for the next time (LCM, TLCM, SCott), a deterministic
            DDIM step, or TCD's mixture of the two (arXiv 2402.19159).
        gamma: TCD's share of noise: 0 is DDIM, 1 close to ``renoise``. For ``tcd`` only.
        boundary: ``lcm`` applies LCM's c_skip and c_out; they differ from none by under 0.3 % from t = 1 on.
        guidance: Guidance scale (1 plain) that is fed to the network; None where it has no such input.
        prediction: What the network predicts.
        start: What it was trained to start from: ``noise``, or the latent of an ``image`` that it is to change.

    Raises:
        ValueError: Times are empty, do not decrease or are given twice for a number of steps; an unknown name; a gamma
            outside [0, 1]; a boundary with anything but ``renoise``.
    """

    times: tuple[tuple[float, ...], ...]
    kind: Kind = "renoise"
    gamma: float = 0.3
    boundary: BoundaryKind = "none"
    guidance: float | None = None
    prediction: PredictionType = "eps"
    start: Start = "noise"

    def __post_init__(self) -> None:
        if not self.times or any(not steps for steps in self.times):
            raise ValueError(f"times are needed for at least one number of steps, got {self.times}")
        if len(set(self.step_counts)) < len(self.times):
            raise ValueError(f"times are given twice for one number of steps: {self.step_counts}")
        for steps in self.times:
            if any(later >= earlier for earlier, later in pairwise(steps)):
                raise ValueError(f"times must decrease strictly, got {steps}")
        for value, known in (
            (self.kind, get_args(Kind)),
            (self.boundary, get_args(BoundaryKind)),
            (self.prediction, PREDICTION_TYPES),
            (self.start, get_args(Start)),
        ):
            if value not in known:
                raise ValueError(f"expected one of {known}, got {value!r}")
        if not 0.0 <= self.gamma <= 1.0:
            raise ValueError(f"gamma must lie in [0, 1], got {self.gamma}")
        if self.boundary != "none" and self.kind != "renoise":
            raise ValueError(f"boundary {self.boundary!r} belongs to kind 'renoise', got {self.kind!r}")

    @classmethod
    def from_method(
        cls,
        method: DistillationMethod,
        prediction: PredictionType,
        *,
        boundary: BoundaryKind = "none",
        guidance: float | None = None,
    ) -> FewStepSampling:
        """The step counts and times that a method trains for; the rest as in the class."""
        times = tuple(tuple(method.inference_times(count).tolist()) for count in method.step_counts)
        return cls(times=times, kind=method.sampling, boundary=boundary, guidance=guidance, prediction=prediction)

    @property
    def step_counts(self) -> tuple[int, ...]:
        """Numbers of steps that can be asked for."""
        return tuple(len(steps) for steps in self.times)

    def times_for(self, num_steps: int) -> tuple[float, ...]:
        """Times of the evaluations in ``num_steps`` steps.

        Raises:
            ValueError: The student was not trained for so many steps.
        """
        for steps in self.times:
            if len(steps) == num_steps:
                return steps
        known = ", ".join(map(str, sorted(self.step_counts)))
        raise ValueError(f"this student was trained for {known} steps, not for {num_steps}")

    def to_json(self) -> dict[str, Any]:
        """The record as JSON values."""
        values = asdict(self)
        values["times"] = {str(len(steps)): list(steps) for steps in self.times}
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> FewStepSampling:
        """The record that ``to_json`` gave.

        Raises:
            ValueError: A field is missing, unknown or malformed.
        """
        values = {"start": "noise", **values}  # older records know no other
        if set(values) != set(cls.__slots__):
            raise ValueError(f"expected the fields {sorted(cls.__slots__)}, got {sorted(values)}")
        times = values["times"]
        if not isinstance(times, Mapping) or any(str(len(steps)) != count for count, steps in times.items()):
            raise ValueError(f"times must map each number of steps to as many times, got {times}")
        numbers = [values["gamma"], *([] if values["guidance"] is None else [values["guidance"]])]
        numbers += [t for steps in times.values() for t in steps]
        if any(isinstance(number, bool) or not isinstance(number, int | float) for number in numbers):
            raise ValueError(f"times, gamma and guidance must be numbers, got {dict(values)}")
        rows = tuple(tuple(float(t) for t in steps) for steps in times.values())
        return cls(**{**values, "times": rows})

    def sample(
        self,
        denoiser: Denoiser,
        x_T: Tensor,
        condition: Condition,
        *,
        num_steps: int,
        generator: Generators | None = None,
    ) -> Tensor:
        """Sample in ``num_steps`` steps as the student was trained to.

        Runs with gradients if they are enabled.

        Args:
            denoiser: The student.
            x_T: (B, C, h, w) pure noise, or what else it starts from.
            condition: Conditioning of batch size B or 1; ``guidance`` is filled in where the student wants one.
            num_steps: One of ``step_counts``.
            generator: Noise source; needed for several steps of ``renoise`` and ``tcd``.

        Returns:
            (B, C, h, w) clean latents.

        Raises:
            ValueError: Untrained number of steps, another kind of prediction, or no generator where one is needed.
        """
        if denoiser.prediction_type != self.prediction:
            raise ValueError(f"this record is of a {self.prediction} network, got a {denoiser.prediction_type} one")
        times = torch.tensor(self.times_for(num_steps), dtype=torch.float64)
        condition = condition.expand(len(x_T))
        if self.guidance is not None and condition.guidance is None:
            condition = replace(condition, guidance=torch.full((len(x_T),), self.guidance, device=x_T.device))
        if self.kind == "renoise":
            boundary = lcm_boundary if self.boundary == "lcm" else None
            return renoise_sample(denoiser, x_T, times, condition, generator=generator, boundary=boundary)
        if self.kind == "ddim":  # to the clean end: what is left at time 0 is in one step the noise itself
            clean_t = denoiser.schedule.clean_t
            return sample_with_solver(denoiser, x_T, times, condition, solver=ddim, final_t=clean_t)
        # Not to alpha = 1 but to the least noisy trained time, as diffusers' TCDScheduler.
        final_t = max(denoiser.schedule.final_t, 0.0)
        solver = tcd(denoiser.schedule, self.gamma)
        return sample_with_solver(denoiser, x_T, times, condition, solver=solver, final_t=final_t, generator=generator)


def tcd(schedule: NoiseSchedule, gamma: float) -> Solver:
    """Strategic stochastic sampling of TCD (arXiv 2402.19159, section 4.3): down to ``(1 - gamma) s``, back up to s.

    Args:
        schedule: The denoiser's schedule.
        gamma: 0 deterministic, 1 all the way to the clean end and back.
    """

    def solver(step: Step) -> Tensor:
        # Whole times, as in diffusers' TCDScheduler, whose tables have no others.
        low_t = torch.floor((1.0 - gamma) * step.s)
        if gamma == 0.0 or bool((low_t >= step.s).all()):
            return ddim(step)
        low = schedule.coefficients(low_t)
        ratio = step.coef_s.alpha / low.alpha
        spread = (step.coef_s.sigma**2 - (ratio * low.sigma) ** 2).clamp(min=0.0).sqrt()
        x, prediction = step.x_t, step.prediction
        x_low = like(low.alpha, x) * prediction.x_0 + like(low.sigma, x) * prediction.eps
        return like(ratio, x) * x_low + like(spread, x) * step.draw()

    return solver
