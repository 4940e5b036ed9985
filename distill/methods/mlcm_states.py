"""States that MLCM trains on and the moves it makes: teacher steps, jumps, multistep denoising, the student's samples.

Everything here runs without gradients but `jump`. Cost is counted in forward-equivalents F of the denoiser; a guided
evaluation is 2 F. No evaluation is made whose result is thrown away, but where ranks share out the teacher's weights
and have to keep in step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distill.denoiser import Condition, Denoiser, Prediction
from distill.lockstep import most_evaluations
from distill.methods.consistency import forget_casts
from distill.methods.segments import from_clock, to_clock
from distill.moves import guide, move
from distill.schedules import NoiseSchedule, working_dtype
from distill.solvers import ddim_step


def jump(schedule: NoiseSchedule, x_t: Tensor, prediction: Prediction, t: Tensor, s: Tensor) -> Tensor:
    """Deterministic DDIM from t to s; ``x_t``, result (B, C, h, w); t, s (B,). With gradients."""
    return ddim_step(x_t, prediction, schedule.coefficients(t), schedule.coefficients(s))


class GuidedTeacher:
    """A frozen teacher with classifier-free guidance in diffusers' convention, for parts of a batch.

    Args:
        teacher: Frozen and unguided.
        guidance_scale: w; 1 or less is the plain conditional teacher (1 F instead of 2 F for each evaluation).
        condition: Condition of the whole batch.
        null: What guidance guides away from, of batch size B or 1; may be empty when there is no guidance.

    Raises:
        ValueError: Guidance is asked for and ``null`` is empty.
    """

    def __init__(self, teacher: Denoiser, guidance_scale: float, condition: Condition, null: Condition) -> None:
        if guidance_scale > 1.0 and null.is_empty:
            raise ValueError(f"guidance_scale {guidance_scale} needs a null condition, and the batch has none")
        self.teacher, self.guidance_scale = teacher, guidance_scale
        self.condition, self.null = condition, null

    def predict(self, x_t: Tensor, t: Tensor, *, index: slice | Tensor | None = None) -> Prediction:
        """Guided prediction for the samples ``index`` of the batch (all when None); x_t (n, C, h, w), t (n,)."""
        teacher, condition = self._on(index)
        return teacher.predict(x_t, t, condition)

    @torch.no_grad()
    def move(self, x_t: Tensor, t: Tensor, s: Tensor, *, num_steps: int = 1) -> Tensor:
        """DDIM of the whole batch from t to s < t in equal steps, (B, C, h, w); t, s (B,). 2 F (1 F) a step."""
        return move(self._on(None)[0], x_t, t, s, self.condition, num_steps=num_steps)

    def _on(self, index: slice | Tensor | None) -> tuple[Denoiser, Condition]:
        condition, null = self.condition, self.null
        if index is not None:
            condition = condition if condition.batch_size in (None, 1) else condition[index]
            null = null if null.batch_size in (None, 1) else null[index]
        plain = self.guidance_scale <= 1.0
        return (self.teacher if plain else guide(self.teacher, self.guidance_scale, null)), condition


@torch.no_grad()
def denoised_states(guide: GuidedTeacher, x_T: Tensor, t: Tensor, num_steps: Tensor) -> Tensor:
    """Image-free training states: the teacher's own trajectories (TLCM Algorithm 1, multistep denoising).

    Sample i takes ``num_steps[i]`` DDIM steps of equal length from the noisiest time to ``t[i]``. Samples are sorted
    by their number of steps and each step evaluates those that still need it, so the cost is
    ``sum(num_steps)`` evaluations of one sample.

    Args:
        guide: The guided teacher.
        x_T: (B, C, h, w) standard normal noise.
        t: (B,) times of the states.
        num_steps: (B,) int64 on the CPU, at least 1.

    Returns:
        (B, C, h, w) states at ``t``.
    """
    schedule = guide.teacher.schedule
    order = num_steps.argsort(descending=True, stable=True)
    counts = num_steps[order]
    index = order.to(x_T.device)
    x, end, total = x_T[index], t[index], counts.to(t)
    goal = from_clock(schedule, end)
    for k in range(most_evaluations(guide.teacher, int(counts[0]))):
        active = int((counts > k).sum())
        if not active:  # other ranks are not done, and evaluate weights that this one has a share of
            guide.predict(x[:1], end[:1], index=index[:1])
            continue
        span = (schedule.terminal_t - goal[:active]) / total[:active]
        here, there = (to_clock(schedule, schedule.terminal_t - span * step) for step in (k, k + 1))
        # The last step lands on t itself, whatever the rounding of the steps before.
        there = torch.where(total[:active] == k + 1, end[:active], there)
        moved = jump(schedule, x[:active], guide.predict(x[:active], here, index=index[:active]), here, there)
        x = torch.cat([moved, x[active:]])
    result = torch.empty_like(x)
    result[index] = x
    return result


@torch.no_grad()
def student_samples(student: Denoiser, eps: Tensor, times: Sequence[float] | Tensor, condition: Condition) -> Tensor:
    """Samples ``x_0`` of the student in a few steps that re-noise with the *same* noise (TLCM Algorithm 2, line 1).

    Args:
        student: The network being trained; q evaluations, detached.
        eps: (B, C, h, w) standard normal noise, the start and every re-noising.
        times: (q,) evaluation times, noisiest first.
        condition: Of batch size B.

    Returns:
        (B, C, h, w) clean latents.
    """
    x_t, x_0 = eps, eps
    for number, time in enumerate(torch.as_tensor(times, dtype=torch.float64).tolist()):
        t = torch.full((len(eps),), time, device=eps.device, dtype=working_dtype(eps.device))
        x_t = eps if number == 0 else student.schedule.add_noise(x_0, eps, t)
        x_0 = student.predict(x_t, t, condition).x_0
    forget_casts()
    return x_0
