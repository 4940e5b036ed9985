"""Pairs of noise and what a frozen teacher makes of it: the data of reflow, one-step distillation and HiPA.

InstaFlow (arXiv 2309.06380, section 3) makes ``(prompt, X_0 ~ N(0, I), X_1 = ODE[v](X_0 | prompt))`` with a 25-step
solver under guidance; HiPA (arXiv 2311.18158) compares its one step with the same-noise sample of many steps. Pairs
come with the batch (``DistillBatch.noise`` beside ``x_0``) or are made on the fly by the same rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from distill.condition import Condition
from distill.denoiser import Denoiser, GuidedDenoiser
from distill.method import DistillBatch
from distill.noise import Generators, gaussian_like
from distill.samplers import Solver, ddim, dpmpp_2m, euler, heun, sample
from distill.timesteps import timesteps, uniform_flow_times

SolverName = Literal["ddim", "dpmpp_2m", "euler", "heun"]

_SOLVERS: dict[SolverName, Solver] = {"ddim": ddim, "dpmpp_2m": dpmpp_2m, "euler": euler, "heun": heun}


@dataclass(frozen=True)  # no slots: as a default argument, jsonargparse reads it by vars()
class TeacherSolver:
    """How a teacher turns noise into a latent: solver, steps and guidance.

    Times are ``trailing`` (they start at the noisiest one, arXiv 2305.08891), for noise and latent to belong to the
    whole trajectory. On a flow these are InstaFlow's ``1000 (1 - i / N)``; those of ``euler`` divide the flow time
    equally on other schedules, too, which is what a rectified flow wants, in whatever clock its network thinks.

    Attributes:
        name: ``dpmpp_2m`` (the paper's DPM-Solver class), ``ddim``, ``euler`` (DDIM at equal steps of the flow time) or
            ``heun``.
        num_steps: Steps N; 25 in the paper.
        guidance_scale: w of classifier-free guidance, 1 is none. The paper's: 5 for SD 1.5, 1.5 for a 2-rectified flow.

    Raises:
        ValueError: Unknown solver, or fewer than one step.
    """

    name: SolverName = "dpmpp_2m"
    num_steps: int = 25
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in get_args(SolverName):
            raise ValueError(f"solver must be one of {get_args(SolverName)}, got {self.name!r}")
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be >= 1, got {self.num_steps}")

    @property
    def is_guided(self) -> bool:
        """Whether a null condition is needed."""
        return self.guidance_scale > 1.0

    def evaluations(self, *, guided: bool | None = None) -> int:
        """Forward passes of the network for each sample, guidance's null passes included.

        Args:
            guided: Whether guidance is in force; by default as the scale says.
        """
        per_step = 2 if self.name == "heun" else 1
        passes = self.num_steps * per_step - (per_step - 1)  # Heun's last step lands clean: one evaluation
        return passes * (2 if (self.is_guided if guided is None else guided) else 1)

    @torch.no_grad()
    def solve(self, teacher: Denoiser, noise: Tensor, condition: Condition, null: Condition | None = None) -> Tensor:
        """The teacher's latent for a noise.

        Args:
            teacher: Unguided network.
            noise: (B, C, h, w) standard normal.
            condition: Of batch size B.
            null: What guidance guides away from; empty or None means no guidance, whatever the scale.

        Returns:
            (B, C, h, w) clean latents, without gradient.
        """
        schedule, count = teacher.schedule, self.num_steps
        times = uniform_flow_times(schedule, count) if self.name == "euler" else timesteps(schedule, count, "trailing")
        network = guided(teacher, self.guidance_scale, null)
        return sample(network, noise, times, condition, solver=_SOLVERS[self.name], final_t=teacher.schedule.clean_t)


DEFAULT_SOLVER = TeacherSolver()


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """Two ends of one teacher trajectory."""

    noise: Tensor  # (B, C, h, w) X_0 of the papers
    x_0: Tensor  # (B, C, h, w) X_1 of the papers


def guided(denoiser: Denoiser, guidance_scale: float, null: Condition | None) -> Denoiser:
    """The denoiser under guidance, or itself where there is nothing to guide away from or the scale is at most 1."""
    if null is None or null.is_empty or guidance_scale <= 1.0:
        return denoiser
    return GuidedDenoiser(denoiser, guidance_scale, null)


def pair_of(batch: DistillBatch, teacher: Denoiser, solver: TeacherSolver, generator: Generators) -> Pair:
    """The batch's pairs, or new ones by the teacher; clean latents that came without their noise are not used.

    Args:
        batch: Conditions, and perhaps ``x_0`` with ``noise``.
        teacher: Frozen and unguided.
        solver: How pairs are made where the batch has none.
        generator: Of their noise.
    """
    if batch.noise is not None and batch.x_0 is not None:
        return Pair(noise=batch.noise, x_0=batch.x_0)
    noise = gaussian_like(template(batch), generator)
    return Pair(noise=noise, x_0=solver.solve(teacher, noise, batch.condition, batch.null))


def template(batch: DistillBatch) -> Tensor:
    """An empty float32 tensor of a batch's latent shape (B, C, h, w), on the device of its tensors."""
    held = (batch.x_0, *(getattr(batch.condition, name) for name in batch.condition.__slots__))
    device = next((value.device for value in held if value is not None), torch.device("cpu"))
    return torch.empty(batch.batch_size, *batch.latent_shape, device=device)
