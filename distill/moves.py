"""Moves of a frozen teacher from time t to time s < t in several solver sub-steps, each sample at its own times."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from distill.denoiser import Condition, Denoiser, GuidedDenoiser
from distill.er_sde import SDE_5, NoiseScale, er_sde
from distill.noise import Generators
from distill.samplers import Solver, ddim, ddim_eta, sample
from distill.schedules import as_times

SolverKind = Literal["ddim", "er_sde"]


@dataclass(frozen=True)  # no slots: as a default argument, jsonargparse reads it by vars()
class SolverSettings:
    """A solver by name and numbers, as run files write it.

    Attributes:
        kind: ``ddim``, with noise where ``eta > 0``, or ``er_sde``.
        eta: Noise of DDIM: 0 none (the ODE), 1 DDPM's.
        noise_scale: The noise-scale function of ER-SDE.
        order: Order of ER-SDE, 1 to 3. History restarts with every move.

    Raises:
        ValueError: Unknown kind, negative eta, or a number that has no effect on this kind.
    """

    kind: SolverKind = "ddim"
    eta: float = 0.0
    noise_scale: NoiseScale = SDE_5
    order: int = 1

    def __post_init__(self) -> None:
        if self.kind not in get_args(SolverKind):
            raise ValueError(f"kind must be one of {get_args(SolverKind)}, got {self.kind!r}")
        if self.eta < 0.0:
            raise ValueError(f"eta must be >= 0, got {self.eta}")
        if self.kind == "er_sde" and self.eta:
            raise ValueError(f"eta is DDIM's: choose a noise_scale for er_sde, got eta = {self.eta}")
        if self.kind == "ddim" and self.order != 1:
            raise ValueError(f"DDIM is of first order, got order = {self.order}")
        self.make()

    def make(self) -> Solver:
        """The solver for ``distill.samplers.sample``."""
        if self.kind == "er_sde":
            return er_sde(self.noise_scale, order=self.order)
        return ddim_eta(self.eta) if self.eta > 0.0 else ddim


def sub_times(t: Tensor, s: Tensor, num_steps: int) -> Tensor:
    """Times of ``num_steps`` equal moves from t (B,) to s (B,), both included: (num_steps + 1, B) float64.

    Raises:
        ValueError: Fewer than one step.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be >= 1, got {num_steps}")
    t, s = as_times(t), as_times(s)
    part = torch.arange(num_steps + 1, dtype=t.dtype, device=t.device)[:, None] / num_steps
    return torch.lerp(t.expand(num_steps + 1, -1), s.expand(num_steps + 1, -1), part)


@torch.no_grad()
def move(
    teacher: Denoiser,
    x_t: Tensor,
    t: Tensor,
    s: Tensor,
    condition: Condition,
    *,
    num_steps: int = 1,
    solver: Solver = ddim,
    generator: Generators | None = None,
) -> Tensor:
    """Carry states from their times t to their times s in ``num_steps`` equal sub-steps, without gradients.

    Args:
        teacher: The network, guided or not; see ``guide``.
        x_t: (B, C, h, w) states at t.
        t: (B,) times.
        s: (B,) times to reach, each below its t.
        condition: Of batch size B (or 1).
        num_steps: h.
        solver: Any solver of ``distill.samplers`` or ``distill.er_sde``.
        generator: Noise source; needed by solvers with noise.

    Returns:
        (B, C, h, w) states at s, detached.

    Raises:
        ValueError: A sample's s is not below its t, or noise is needed and there is no generator.
    """
    if t.device.type == "cpu" and not bool((s < t).all()):
        raise ValueError(f"every sample must move to a smaller time, got t = {t.tolist()}, s = {s.tolist()}")
    times = sub_times(t, s, num_steps)
    return sample(teacher, x_t, times[:-1], condition, solver=solver, targets=times[1:], generator=generator)


def guide(teacher: Denoiser, guidance_scale: float | Tensor, null: Condition) -> Denoiser:
    """The teacher with classifier-free guidance, in the convention of diffusers' ``guidance_scale`` and of Imagen.

    ``guidance_scale = 1`` is the plain conditional teacher; it costs one evaluation if it is given as a number.
    The LCM papers' w is one less: their ``[2, 14]`` is ``[3, 15]`` here. A script that draws w in one convention and
    applies it in the other is off by one, silently; ``guide_lcm`` takes their number.

    Args:
        teacher: The conditional network.
        guidance_scale: A number, or (B,) for one per sample.
        null: The null condition, see ``distill.denoiser.GuidedDenoiser``.

    Raises:
        ValueError: Guidance is asked for and the null condition is empty.
    """
    if not isinstance(guidance_scale, Tensor) and guidance_scale == 1.0:
        return teacher
    # The teacher's own guidance input, where it has one (FLUX), is the condition's business, not the null's.
    return GuidedDenoiser(teacher, guidance_scale, replace(null, guidance=None))


def guide_lcm(teacher: Denoiser, weight: float | Tensor, null: Condition) -> Denoiser:
    """Guidance by LCM's weight: ``(1 + w) eps_condition - w eps_null`` (arXiv 2310.04378, eq. 13); 0 is plain."""
    return guide(teacher, GuidedDenoiser.from_lcm_weight(weight), null)
