"""Toys for the tests of MLCM and its extras."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distill.condition import Condition
from distill.denoiser import Denoiser
from distill.methods.segments import milestones
from distill.parameterization import like
from distill.schedules import NoiseSchedule
from distill.toy import GaussianMixtureDenoiser


class Linear(Denoiser):
    """Trainable: ``w x + b + c`` with c a number given by the condition; counts the samples that it is asked about."""

    def __init__(self, schedule: NoiseSchedule, kind: str = "eps", start: float = 0.7) -> None:
        super().__init__(schedule, kind)  # type: ignore[arg-type]
        self.w, self.b = nn.Parameter(torch.tensor(start)), nn.Parameter(torch.tensor(0.1))
        self.evaluated = 0

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.evaluated += len(x_t)
        shift = 0.0 if condition.embeds is None else condition.embeds.mean((1, 2)).reshape(-1, 1, 1, 1)
        return self.w * x_t + self.b * (like(t, x_t) / 1000) + shift


class ExactJump(Denoiser):
    """The prediction whose DDIM jump to the lower end of its segment is the exact ODE's, for one Gaussian."""

    def __init__(self, teacher: GaussianMixtureDenoiser, num_segments: int) -> None:
        super().__init__(teacher.schedule, "x0")
        self.teacher, self.borders = teacher, milestones(teacher.schedule, num_segments)

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        s = self.borders[torch.searchsorted(self.borders, t.contiguous()) - 1]
        coef_t, coef_s = (self.schedule.coefficients(time) for time in (t, s))
        x_s = self._transport(x_t, coef_t, coef_s)
        determinant = coef_t.alpha * coef_s.sigma - coef_s.alpha * coef_t.sigma
        x_0 = (like(coef_s.sigma, x_t) * x_t - like(coef_t.sigma, x_t) * x_s) / like(determinant, x_t)
        return x_0

    def _transport(self, x_t: Tensor, coef_t, coef_s) -> Tensor:
        spread_t, spread_s = ((coef.alpha**2 * self.teacher.std**2 + coef.sigma**2).sqrt() for coef in (coef_t, coef_s))
        centred = x_t - like(coef_t.alpha, x_t) * self.teacher.means
        return like(coef_s.alpha, x_t) * self.teacher.means + like(spread_s / spread_t, x_t) * centred


def conditions(size: int, level: float = 0.3) -> Condition:
    """Conditions of B samples, all different."""
    return Condition(embeds=torch.linspace(-level, level, size).reshape(-1, 1, 1))
