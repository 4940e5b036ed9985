"""One-step distillation of a flow (InstaFlow, arXiv 2309.06380, eq. 7): ``argmin E D(ODE[v](X_0), X_0 + v(X_0))``.

The time is fixed at the noise end. D is L2 first and a perceptual distance later, of decoded images or of latents.
From a 2-rectified flow this is InstaFlow; straight from the teacher it is the baseline "direct distillation".
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.denoiser import Denoiser
from distill.held import Held
from distill.method import DistillationMethod, DistillBatch, MethodOutput, Networks
from distill.methods.image_space import ImageSpace
from distill.methods.pairs import DEFAULT_SOLVER, TeacherSolver, pair_of
from distill.methods.reflow import Reading, clock_of, read_as
from distill.schedules import NoiseSchedule, VPSchedule


def one_step(student: Denoiser, noise: Tensor, batch: DistillBatch) -> Tensor:
    """The student's latent from pure noise in one evaluation at its noisiest time, (B, C, h, w).

    On a flow this is ``X_0 + v(X_0)``; elsewhere ``(x_T - sigma_T eps) / alpha_T``.
    """
    return student.predict(noise, student.schedule.terminal_t, batch.condition).x_0


class OneStepDistillation(DistillationMethod):
    """Regression of the teacher's samples in one step, in two phases: L2, then perceptual.

    Args:
        solver: How pairs are made where the batch has none (teacher: the reflowed model; guidance 1.5 in the paper).
        perceptual: Distance () of two batches of images, or of latents where there is no decoder; None: L2 only.
        decoder: Has ``decode(latents) -> images``, for a distance of images.
        perceptual_start: Optimizer step at which the perceptual phase begins (the paper: 21,500 of 39,500).
        l2_after: Weight of L2 in the perceptual phase; 0 in the paper.
        crop: Side in latent positions of the random part that is decoded and compared; None: the whole.
        reading: How a student that is no flow is read, see `distill.methods.reflow`.
        toward_image: Sign of the output in the reading ``reinterpret``.
        schedule: The student's own schedule for `inference_times`, default Stable Diffusion's; set from the student
            at the first batch.

    Raises:
        ValueError: A negative start or weight, or a decoder without a distance.
    """

    needs_latents = False

    def __init__(
        self,
        *,
        solver: TeacherSolver = DEFAULT_SOLVER,
        perceptual: nn.Module | None = None,
        decoder: nn.Module | None = None,
        perceptual_start: int = 0,
        l2_after: float = 0.0,
        crop: int | None = None,
        reading: Reading = "exact",
        toward_image: bool = True,
        schedule: NoiseSchedule | None = None,
    ) -> None:
        super().__init__()
        if perceptual_start < 0 or l2_after < 0:
            raise ValueError(f"perceptual_start {perceptual_start} and l2_after {l2_after} must be >= 0")
        if decoder is not None and perceptual is None:
            raise ValueError("a decoder is of use to a perceptual distance only, and there is none")
        self.solver = solver
        self.perceptual = None if perceptual is None else Held(perceptual, frozen=True)
        self.space = ImageSpace(decoder, crop=crop)
        self.perceptual_start = perceptual_start
        self.l2_after = l2_after
        self.reading: Reading = reading
        self.toward_image = toward_image
        self.needs_null = solver.is_guided
        self.schedule: NoiseSchedule = schedule or VPSchedule()

    @property
    def weights(self) -> Mapping[str, float]:
        """All ones: which term counts when is settled by the phases."""
        return {}

    @property
    def parts(self) -> Mapping[str, int]:
        """See `DistillationMethod.parts`."""
        return {} if self.perceptual is None else {"the perceptual loss (perceptual_start)": self.perceptual_start}

    def losses(self, networks: Networks, batch: DistillBatch, *, step: int, generator: torch.Generator) -> MethodOutput:
        """The terms ``l2`` and, from ``perceptual_start`` on, ``perceptual``."""
        student = read_as(networks.student, self.reading, toward_image=self.toward_image)
        self.schedule = networks.student.schedule
        pair = pair_of(batch, networks.teacher, self.solver, generator)
        x_0 = one_step(student, pair.noise, batch)
        if self.perceptual is None or step < self.perceptual_start:
            return MethodOutput({"l2": F.mse_loss(x_0, pair.x_0)})
        images, targets = self.space(x_0, pair.x_0, generator=generator)
        terms = {"perceptual": self.perceptual.on(images.device)(images, targets)}
        if self.l2_after > 0:
            terms["l2"] = self.l2_after * F.mse_loss(x_0, pair.x_0)
        return MethodOutput(terms)

    def inference_times(self, num_steps: int) -> Tensor:
        """The noisiest time, for one step."""
        if num_steps != 1:
            raise ValueError(f"trained for 1 step, not for {num_steps}")
        return torch.tensor([clock_of(self.schedule, self.reading).terminal_t], dtype=torch.float64)

    @property
    def step_counts(self) -> tuple[int, ...]:
        """One."""
        return (1,)
