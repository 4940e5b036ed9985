"""A student's pictures beside its teacher's, from equal noise: what grids and the validation score are made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distill.condition import Condition
from distill.denoiser import Denoiser, GuidedDenoiser
from distill.few_step import FewStepSampling
from distill.method import DistillBatch, Networks
from distill.noise import gaussian_like
from distill.samplers import sample
from distill.timesteps import timesteps
from layton.tasks.latent_score import sliced_wasserstein


class Previews:
    """Samples of student and teacher at fixed seeds.

    The teacher's validation samples are made once and kept, on the CPU: it does not change.

    Args:
        networks: Of the run.
        sampling: How the student is sampled.
        steps: Numbers of steps to show; those that the student is not trained for are left out, and if none is left
            all that it is trained for are shown.
        reference_steps: Steps of the teacher, at least 1.
        reference_guidance: Its guidance scale; 1 or less is the plain teacher.

    Raises:
        ValueError: No step for the teacher.
    """

    def __init__(
        self,
        networks: Networks,
        sampling: FewStepSampling,
        *,
        steps: Sequence[int],
        reference_steps: int,
        reference_guidance: float,
    ) -> None:
        if reference_steps < 1:
            raise ValueError(f"reference_steps must be >= 1, got {reference_steps}")
        self.networks, self.sampling = networks, sampling
        known = tuple(count for count in steps if count in sampling.step_counts)
        self.steps = known or tuple(sampling.step_counts)
        self.reference_steps, self.reference_guidance = reference_steps, reference_guidance
        self._references: dict[int, Tensor] = {}
        self._samples: dict[int, list[Tensor]] = {}

    @torch.no_grad()
    def reference(self, batch: DistillBatch, seeds: Sequence[int]) -> Tensor:
        """The teacher's latents (B, C, h, w) in many guided steps, each from the noise of its own seed.

        Where the student starts from images, those that are wanted.
        """
        if self.sampling.start == "image":
            return _of_pair(batch.x_0)
        x_T, _ = _start(batch, seeds)
        teacher: Denoiser = self.networks.teacher
        # A network that is told the guidance scale has it built in.
        if self.reference_guidance > 1.0 and not batch.null.is_empty and batch.condition.guidance is None:
            teacher = GuidedDenoiser(teacher, self.reference_guidance, batch.null)
        return sample(teacher, x_T, timesteps(teacher.schedule, self.reference_steps, "trailing"), batch.condition)

    @torch.no_grad()
    def generate(self, batch: DistillBatch, num_steps: int, seeds: Sequence[int]) -> Tensor:
        """The student's latents (B, C, h, w) in few steps, each from its own seed.

        Raises:
            ValueError: The student is not trained for so many steps.
        """
        x_T, generators = _start(batch, seeds)
        if self.sampling.start == "image":
            x_T = _of_pair(batch.noise)
        return self.sampling.sample(
            self.networks.student, x_T, batch.condition, num_steps=num_steps, generator=generators
        )

    def rows(self, batch: DistillBatch, seeds: Sequence[int]) -> dict[str, Tensor]:
        """Latents (B, C, h, w) by name: the teacher's, and the student's in each number of steps.

        Where it starts from images: those that are given, that are wanted, and the student's.
        """
        names = {count: f"{count} step{'s' * (count > 1)}" for count in self.steps}
        given = {"given": _of_pair(batch.noise)} if self.sampling.start == "image" else {}
        wanted = "wanted" if given else "teacher"
        return (
            given
            | {wanted: self.reference(batch, seeds)}
            | {name: self.generate(batch, count, seeds) for count, name in names.items()}
        )

    def collect(self, batch: DistillBatch, index: int) -> None:
        """Sample for one validation batch; ``index`` is its place and decides the seeds."""
        seeds = [index * 100_000 + row for row in range(batch.batch_size)]
        if index not in self._references:
            self._references[index] = self.reference(batch, seeds).cpu()
        self._samples.setdefault(0, []).append(self._references[index])
        for count in self.steps:
            self._samples.setdefault(count, []).append(self.generate(batch, count, seeds).cpu())

    def forget(self) -> None:
        """Other batches come: the teacher's samples are of the last ones."""
        self._references, self._samples = {}, {}

    def scores(self) -> dict[str, float]:
        """``score_N`` for N steps and their mean ``score``, smaller is better; what was collected is let go."""
        samples = {count: torch.cat(parts) for count, parts in self._samples.items()}
        self._samples = {}
        if not self.steps or 0 not in samples:
            return {}
        found = {f"score_{count}": sliced_wasserstein(samples[count], samples[0]) for count in self.steps}
        return {**found, "score": sum(found.values()) / len(found)}


def _start(batch: DistillBatch, seeds: Sequence[int]) -> tuple[Tensor, list[torch.Generator]]:
    device = _device(batch.condition)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return gaussian_like(torch.empty(len(seeds), *batch.latent_shape, device=device), generators), generators


def _of_pair(latents: Tensor | None) -> Tensor:
    if latents is None:
        raise ValueError("a student that starts from images is shown pairs of them: batches need 'noise' and 'latent'")
    return latents


def _device(condition: Condition) -> torch.device:
    return torch.device("cpu") if condition.embeds is None else condition.embeds.device
