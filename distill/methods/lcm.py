"""Latent consistency distillation (LCM, arXiv 2310.04378; LCM-LoRA, arXiv 2311.05556): the baseline."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from distill.method import DistillBatch, MethodOutput, Networks
from distill.methods.consistency import BoundaryKind, ConsistencyMethod, ConsistencySettings, DistanceKind, distance
from distill.samplers import ddim
from distill.schedules import NoiseSchedule


class LCM(ConsistencyMethod):
    """One guided DDIM step of 20 times on a grid of 50, and agreement of the two ends.

    Terms: ``consistency``. Per sample: the student forward and backward (3), the guided teacher (2), the target (1).

    Two published variants: full fine-tuning with ``condition_on_guidance=True`` and an averaged target; LoRA with
    neither (the student never hears the scale, and is its own target): ``target_decay=None``.

    Args:
        num_points: Points of the grid.
        skip: k, the teacher's step.
        guidance_range: Scales in diffusers' convention; LCM's w in [2, 14] is (3, 15). See ``ConsistencySettings``.
        condition_on_guidance: Tell the student the scale.
        distance: ``pseudo_huber`` (c = 0.001) or ``l2``.
        boundary: ``lcm`` or ``none``.
        target_decay: 0.95 in the published scripts; None for LoRA.
        schedule: The student's schedule; by default Stable Diffusion's.
        step_counts: Numbers of steps to offer; at most 50.
        with_teacher: False fits a finished student to images of one's own (latent consistency fine-tuning).

    Raises:
        ValueError: A value out of range.
    """

    def __init__(
        self,
        *,
        num_points: int = 50,
        skip: float = 20.0,
        guidance_range: tuple[float, float] = (3.0, 15.0),
        condition_on_guidance: bool = False,
        distance: DistanceKind = "pseudo_huber",
        boundary: BoundaryKind = "lcm",
        target_decay: float | None = 0.95,
        schedule: NoiseSchedule | None = None,
        step_counts: Sequence[int] = (1, 2, 3, 4, 5, 6, 7, 8),
        with_teacher: bool = True,
    ) -> None:
        settings = ConsistencySettings(
            num_points=num_points,
            skip=skip,
            guidance_range=guidance_range,
            condition_on_guidance=condition_on_guidance,
            distance=distance,
            boundary=boundary,
            with_teacher=with_teacher,
        )
        super().__init__(settings, ddim, target_decay=target_decay, schedule=schedule, step_counts=step_counts)

    def losses(self, networks: Networks, batch: DistillBatch, *, step: int, generator: torch.Generator) -> MethodOutput:
        """The term ``consistency``; see ``DistillationMethod.losses``."""
        pair = self.agree(networks, batch, generator)
        return MethodOutput({"consistency": distance(pair.found, pair.wanted, self.settings.distance)})
