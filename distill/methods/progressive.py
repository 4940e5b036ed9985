"""Progressive distillation (arXiv 2202.00512, Algorithm 2), and its guided variant (arXiv 2210.03142).

In each phase the student learns to do in one DDIM step what its teacher does in two; then the student becomes the
teacher and the number of steps halves. The baseline that InstaFlow and HiPA are measured against.

The phases of one run share the network: at a phase's first step the trainable weights are copied, and the teacher is
the student evaluated with that copy. With adaptors only they are copied, and the copy is saved with the method, so that
a resumed run continues exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from distill.condition import Condition
from distill.denoiser import Denoiser
from distill.held import Held
from distill.method import DistillationMethod, DistillBatch, MethodOutput, Networks
from distill.methods.pairs import guided
from distill.noise import gaussian_like
from distill.parameterization import Coefficients, like
from distill.schedules import NoiseSchedule, VPSchedule, as_times
from distill.solvers import ddim_step
from distill.timesteps import timesteps

Weighting = Literal["truncated_snr", "snr_plus_one", "constant"]


class Snapshot(nn.Module):
    """A copy of a module's trainable parameters, saved as buffers; empty until `take`."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("phase", torch.tensor(-1))
        self.eval()

    def train(self, mode: bool = True) -> Snapshot:
        """Nothing: what is in training mode has buffers that a forward pass may change, and these are constant."""
        return self

    @property
    def taken_in(self) -> int:
        """Number of the phase that it was taken for; -1 before the first."""
        return int(self.get_buffer("phase"))

    def take(self, module: nn.Module, phase: int) -> None:
        """Copy the parameters that require a gradient.

        Raises:
            ValueError: There are none.
        """
        trainable = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
        if not trainable:
            raise ValueError(f"{type(module).__name__} has no trainable parameters: no phase can follow another")
        for name, value in trainable.items():
            self.register_buffer(name.replace(".", "/"), value)
        self.get_buffer("phase").fill_(phase)

    def tensors(self) -> dict[str, Tensor]:
        """The copy, by parameter name."""
        return {name.replace("/", "."): value for name, value in self.named_buffers() if name != "phase"}

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        for key, value in state_dict.items():
            name = key.removeprefix(prefix)
            if key.startswith(prefix) and name not in self._buffers:
                self.register_buffer(name, torch.empty_like(value, device=self.get_buffer("phase").device))
        super()._load_from_state_dict(state_dict, prefix, *args)


class _AsOf(Denoiser):
    """A denoiser evaluated with other weights than it has now."""

    def __init__(self, denoiser: Denoiser, weights: Mapping[str, Tensor]) -> None:
        super().__init__(denoiser.schedule, denoiser.prediction_type)
        self._denoiser = Held(denoiser)
        self._weights = dict(weights)

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Raw prediction; see ``Denoiser.forward``."""
        output: Tensor = torch.func.functional_call(self._denoiser.module, self._weights, (x_t, t, condition))
        return output


class ProgressiveDistillation(DistillationMethod):
    """Halving, phase by phase, within one run.

    Args:
        student_steps: Steps of the student in each phase, each half of the one before; the first phase's teacher takes
            twice the first number.
        steps_per_phase: Optimizer steps of every phase but the last, which goes on to the end of the run.
        guidance_scale: Guidance w of the first teacher, which the student absorbs; 1 is none. Not used where a batch
            has no null condition.
        guidance_phase: Optimizer steps before the first phase in which the student only learns the guided prediction,
            at the first teacher's times (stage one of arXiv 2210.03142); 0 leaves it to the first phase.
        weighting: Of the error of x_0: ``truncated_snr`` = max(alpha^2 / sigma^2, 1) and ``snr_plus_one`` are the
            paper's two, ``constant`` is 1.
        schedule: The student's own schedule for `inference_times`, default Stable Diffusion's; set from the student
            at the first batch.

    Raises:
        ValueError: The numbers of steps do not halve, or a length is out of range.
    """

    needs_latents = True
    keeps_weights = True
    sampling = "ddim"

    def __init__(
        self,
        *,
        student_steps: tuple[int, ...] = (16, 8, 4, 2, 1),
        steps_per_phase: int = 1000,
        guidance_scale: float = 1.0,
        guidance_phase: int = 0,
        weighting: Weighting = "truncated_snr",
        schedule: NoiseSchedule | None = None,
    ) -> None:
        super().__init__()
        student_steps = tuple(student_steps)
        if not student_steps or student_steps[-1] < 1 or any(a != 2 * b for a, b in pairwise(student_steps)):
            raise ValueError(f"student_steps must halve from phase to phase, got {student_steps}")
        if steps_per_phase < 1 or guidance_phase < 0:
            raise ValueError(f"steps_per_phase {steps_per_phase} must be >= 1, guidance_phase {guidance_phase} >= 0")
        if weighting not in get_args(Weighting):
            raise ValueError(f"weighting must be one of {get_args(Weighting)}, got {weighting!r}")
        self.student_steps = student_steps
        self.steps_per_phase = steps_per_phase
        self.guidance_scale = guidance_scale
        self.guidance_phase = guidance_phase
        self.weighting: Weighting = weighting
        self.needs_null = guidance_scale > 1.0
        self.snapshot = Snapshot()
        self.schedule: NoiseSchedule = schedule or VPSchedule()

    def prepare(self, networks: Networks) -> None:
        """Make room for the copy, for a trainer that lists what it saves before the first step. Optional otherwise."""
        self.snapshot.take(networks.student, -1)

    def phase_at(self, step: int) -> int:
        """Number of the phase at an optimizer step; -1 while only guidance is learnt."""
        if step < self.guidance_phase:
            return -1
        return min((step - self.guidance_phase) // self.steps_per_phase, len(self.student_steps) - 1)

    def losses(self, networks: Networks, batch: DistillBatch, *, step: int, generator: torch.Generator) -> MethodOutput:
        """The term ``progressive``; at a phase's first step the student's weights are copied."""
        if batch.x_0 is None:
            raise ValueError("progressive distillation needs clean latents x_0 in the batch")
        student, phase = networks.student, self.phase_at(step)
        self.schedule = student.schedule
        first = phase < 0 or (phase == 0 and self.guidance_phase == 0)
        teacher: Denoiser
        if first:
            teacher = guided(networks.teacher, self.guidance_scale, batch.null)
        elif self.snapshot.taken_in == phase or torch.is_grad_enabled():
            teacher = self._earlier_student(student, phase)
        else:  # validation just before the phase's first step, which alone may take the copy
            teacher = student
        num_steps = self.student_steps[max(phase, 0)]
        t, middle, s = self._times(student.schedule, num_steps, batch.x_0, generator, every=phase < 0)
        noise = gaussian_like(batch.x_0, generator)
        x_t = noisy_state(student.schedule, batch.x_0, noise, t)
        with torch.no_grad():
            if phase < 0:
                target = teacher.predict(x_t, t, batch.condition).x_0
            else:
                target = two_step_target(teacher, x_t, t, middle, s, batch.condition)
        error = (student.predict(x_t, t, batch.condition).x_0 - target).square().flatten(1).mean(dim=1)
        weight = snr_weight(student.schedule.coefficients(t), self.weighting)
        return MethodOutput({"progressive": (weight.to(error) * error).mean()})

    def _earlier_student(self, student: Denoiser, phase: int) -> Denoiser:
        """The student as it was at the phase's first step.

        Raises:
            ValueError: A resumed run does not have it.
        """
        if self.snapshot.taken_in != phase:
            self.snapshot.take(student, phase)
        if not self.snapshot.tensors():
            raise ValueError(f"the weights that phase {phase} learns from are not in the checkpoint it resumes")
        return _AsOf(student, self.snapshot.tensors())

    def _times(
        self, schedule: NoiseSchedule, num_steps: int, x_0: Tensor, generator: torch.Generator, *, every: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A student step for each sample: from ``t`` by ``middle`` to ``s``, each (B,) float64.

        With ``every``, ``t`` is any of the teacher's times, those between two of the student's included.
        """
        grid = timesteps(schedule, 2 * num_steps, "trailing")
        grid = torch.cat([grid, grid.new_full((2,), schedule.clean_t)])
        count, stride = (2 * num_steps, 1) if every else (num_steps, 2)
        index = stride * torch.randint(count, (len(x_0),), generator=generator, device=generator.device).cpu()
        t, middle, s = (as_times(grid[index + offset], x_0.device) for offset in range(3))
        return t, middle, s

    def inference_times(self, num_steps: int) -> Tensor:
        """Trailing times, for the number of steps of one of the phases; integrate with DDIM."""
        if num_steps not in self.student_steps:
            raise ValueError(f"trained for {self.student_steps} steps, not for {num_steps}")
        return timesteps(self.schedule, num_steps, "trailing")

    @property
    def parts(self) -> Mapping[str, int]:
        """See `DistillationMethod.parts`."""
        begin = self.guidance_phase
        return {
            f"{n} steps (steps_per_phase)": begin + i * self.steps_per_phase for i, n in enumerate(self.student_steps)
        }

    @property
    def step_counts(self) -> tuple[int, ...]:
        """The last phase's."""
        return self.student_steps[-1:]

    @property
    def trained_counts(self) -> tuple[int, ...]:
        """Those of the phase that the run has come to."""
        return (self.student_steps[max(self.snapshot.taken_in, 0)],)


def noisy_state(schedule: NoiseSchedule, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """State at ``t`` (B,), and pure noise at the noisiest time even if the schedule has signal left there.

    A student of one step is asked for nothing else; trained with the remaining signal (7 % in Stable Diffusion) it
    would learn to read it, and miss it when sampling.
    """
    x_t = schedule.add_noise(x_0, noise, t)
    pure = like((t >= schedule.terminal_t).to(torch.float32), x_t)
    return torch.where(pure > 0, noise, x_t)


def two_step_target(
    teacher: Denoiser, x_t: Tensor, t: Tensor, middle: Tensor, s: Tensor, condition: Condition
) -> Tensor:
    """The x_0 with which one DDIM step from ``t`` to ``s`` arrives where the teacher's two arrive.

    ``x_0 = (x_s - (sigma_s / sigma_t) x_t) / (alpha_s - (sigma_s / sigma_t) alpha_t)`` (arXiv 2202.00512, Algorithm 2).

    Args:
        teacher: Guided or not.
        x_t: (B, C, h, w) state at ``t``.
        t: (B,) start.
        middle: (B,) where the teacher's first step ends.
        s: (B,) where its second ends.
        condition: Of batch size B.

    Returns:
        (B, C, h, w).
    """
    coef_t, coef_middle, coef_s = (teacher.schedule.coefficients(time) for time in (t, middle, s))
    x_middle = ddim_step(x_t, teacher.predict(x_t, t, condition), coef_t, coef_middle)
    x_s = ddim_step(x_middle, teacher.predict(x_middle, middle, condition), coef_middle, coef_s)
    ratio = coef_s.sigma / coef_t.sigma
    return (x_s - like(ratio, x_t) * x_t) / like(coef_s.alpha - ratio * coef_t.alpha, x_t)


def snr_weight(coef: Coefficients, weighting: Weighting) -> Tensor:
    """Weight of the squared error of x_0, shaped like the coefficients (arXiv 2202.00512, section 4)."""
    snr = coef.alpha**2 / coef.sigma**2
    if weighting == "truncated_snr":
        return snr.clamp(min=1.0)
    return snr + 1.0 if weighting == "snr_plus_one" else torch.ones_like(snr)
