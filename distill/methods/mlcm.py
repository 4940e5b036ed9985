"""MLCM and TLCM: multistep latent consistency distillation, one student for 1 to 8 steps (arXiv 2406.05768).

Time is cut into M segments, and the student learns to jump from anywhere in a segment to its lower end, as the teacher
would go there in many steps. Training states come from the teacher itself, so no images are needed. What version 1 of
the paper (MLCM) does next is to go on with fewer and fewer segments; what version 6 (TLCM) does is a second stage on
the student's own samples. Both are here, with the optional terms of the paper as ``extras``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from distill.denoiser import Denoiser
from distill.lockstep import most_evaluations
from distill.method import DistillationMethod, DistillBatch, MethodOutput, Networks
from distill.methods.adversarial import Adversarial
from distill.methods.consistency import HUBER_C, DistanceKind, distance, forget_casts
from distill.methods.discriminator import Discriminator
from distill.methods.extra_terms import ExtraTerm, StudentOutput
from distill.methods.latent_perceptual import LatentPerceptualDistance
from distill.methods.mlcm_settings import Progression, Refinement
from distill.methods.mlcm_states import GuidedTeacher, denoised_states, jump, student_samples
from distill.methods.segments import (
    GRID_SEGMENTS,
    INFERENCE_INDICES,
    Grouping,
    SegmentTimes,
    draw_times,
    from_clock,
    inference_times,
    milestones,
    to_clock,
)
from distill.schedules import NoiseSchedule, VPSchedule

States = Literal["denoised", "noised"]
T = TypeVar("T", bound=ExtraTerm)

__all__ = ["MLCM", "Progression", "Refinement", "States"]


class MLCM(DistillationMethod):
    """Multistep latent consistency distillation.

    Cost of one sample in forward-equivalents with guidance: denoised states ``2 (M + 1) / 2`` on average (9 for
    M = 8), teacher move 2 h, student 3, target just under 1: 15 for M = 8 and h = 1. Noised states save the first
    part. Stage 2: q + 2 p + 3 + 7 / 8.

    Args:
        progression: Segments by optimizer step; one phase keeps them.
        refinement: Stage 2 and when it takes over; None goes on with stage 1.
        guidance_scale: w of the teacher in diffusers' convention; published 8. At most 1 for teachers without a null
            condition, or with embedded guidance (FLUX: set ``condition.guidance``).
        skip: Length of the teacher's move on a clock of 1000 (published 20); scaled to other clocks.
        teacher_steps: h, DDIM steps within the move.
        states: ``denoised``: trajectories of the teacher, image-free (Algorithm 1); ``noised``: latents of the batch.
        grouping: How segments are spread over a batch, see `distill.methods.segments.draw_times`.
        distance: Between the student's landing point and the target's.
        huber_c: Width of the pseudo-Huber distance.
        features: Measures in the feature space of a network over latents in place of ``distance``.
        extras: Further terms; each carries its weight and its first step.
        target_decay: Decay of the averaged target; published None, the target is the student itself.
        schedule: The student's schedule, for `inference_times`; None is the 1000-step VP clock of Stable Diffusion.

    Raises:
        ValueError: An argument out of range, or two extras of one name.
    """

    def __init__(
        self,
        *,
        progression: Progression | None = None,
        refinement: Refinement | None = None,
        guidance_scale: float = 8.0,
        skip: float = 20.0,
        teacher_steps: int = 1,
        states: States = "denoised",
        grouping: Grouping = "sample",
        distance: DistanceKind = "l2",
        huber_c: float = HUBER_C,
        features: LatentPerceptualDistance | None = None,
        extras: Sequence[ExtraTerm] = (),
        target_decay: float | None = None,
        schedule: NoiseSchedule | None = None,
    ) -> None:
        super().__init__()
        if (
            states not in get_args(States)
            or distance not in get_args(DistanceKind)
            or grouping not in get_args(Grouping)
        ):
            raise ValueError(f"unknown states {states!r}, distance {distance!r} or grouping {grouping!r}")
        if not skip > 0 or teacher_steps < 1 or not huber_c > 0:
            raise ValueError(f"need skip > 0, teacher_steps >= 1, huber_c > 0; got {skip}, {teacher_steps}, {huber_c}")
        starts = () if progression is None else progression.starts
        late = [start for start in starts if refinement is not None and 0 < refinement.start <= start]
        if late:
            raise ValueError(f"phases of the progression begin at steps {late}, where the second stage is under way")
        names = [extra.name for extra in extras]
        if len(set(names)) < len(names):
            raise ValueError(f"extras must differ in name, got {names}")
        self.progression, self.refinement = progression or Progression((8,), (0,)), refinement
        self.guidance_scale, self.skip, self.teacher_steps = guidance_scale, skip, teacher_steps
        self.states: States = states
        self.grouping: Grouping = grouping
        self.distance: DistanceKind = distance
        self.huber_c, self.features = huber_c, features
        self.extras = nn.ModuleList(extras)
        for extra in self._extras():
            extra.begin_by_default(0 if refinement is None else refinement.start)
        self.target_decay = target_decay
        self.schedule = schedule or VPSchedule()
        self.needs_latents = states == "noised"
        self.needs_null = guidance_scale > 1.0 or any(extra.needs_null for extra in extras)

    @property
    def weights(self) -> Mapping[str, float]:
        """Weights of the extras; consistency has 1."""
        return {extra.name: extra.weight for extra in self._extras()}

    def extra(self, kind: type[T]) -> T | None:
        """The extra of a class, for instance to attach its networks; None if there is no such extra."""
        return next((extra for extra in self._extras() if isinstance(extra, kind)), None)

    @property
    def needs_discriminator(self) -> bool:
        """Whether a discriminator must be attached before training."""
        adversarial = self.extra(Adversarial)  # noqa: S610  # no Django here
        return adversarial is not None and adversarial.weight > 0

    def attach(self, discriminator: Discriminator) -> None:
        """Take the discriminator, which can only be made once the networks exist.

        Raises:
            ValueError: This run does without one.
        """
        adversarial = self.extra(Adversarial)  # noqa: S610  # no Django here
        if adversarial is None or not self.needs_discriminator:
            raise ValueError("no adversarial extra with a weight above 0: a discriminator would have no effect")
        adversarial.attach(discriminator)

    @property
    def step_counts(self) -> tuple[int, ...]:
        """1 to 8; the paper reports 2 to 8."""
        return tuple(INFERENCE_INDICES)

    def inference_times(self, num_steps: int) -> Tensor:
        """The published table (`distill.methods.segments.inference_times`), for `distill.samplers.renoise_sample`."""
        return inference_times(self.schedule, num_steps)

    def num_segments(self, step: int) -> int:
        """M at an optimizer step."""
        if self.in_refinement(step) and self.refinement is not None:
            return self.refinement.num_segments
        return self.progression.at(step)

    @property
    def parts(self) -> Mapping[str, int]:
        """See `DistillationMethod.parts`."""
        starts = zip(self.progression.segments, self.progression.starts, strict=True)
        found = {f"{segments} segments (progression.starts)": start for segments, start in starts if start > 0}
        late = [extra for extra in self._extras() if extra.weight and extra.start]
        found |= {f"the {extra.name} term (its start)": extra.start for extra in late}
        if self.refinement is not None:
            found["the second stage (refinement.start)"] = self.refinement.start
        return found

    def in_refinement(self, step: int) -> bool:
        """Whether stage 2 acts at an optimizer step."""
        return self.refinement is not None and step >= self.refinement.start

    def losses(self, networks: Networks, batch: DistillBatch, *, step: int, generator: torch.Generator) -> MethodOutput:
        """Term ``consistency`` and one for each extra; see ``DistillationMethod.losses``."""
        self._check_schedule(networks)
        guide = GuidedTeacher(networks.teacher, self.guidance_scale, batch.condition, batch.null)
        if self.refinement is not None and self.in_refinement(step):
            consistency, output = self._stage_two(self.refinement, networks, guide, batch, generator)
        else:
            consistency, output = self._stage_one(networks, guide, batch, self.progression.at(step), generator)
        terms = {"consistency": consistency}
        for extra in self._extras():
            terms[extra.name] = (
                extra.student_loss(output, networks, batch, step=step, generator=generator)
                if extra.acts_at(step)
                else consistency.new_zeros(())
            )
        inputs = {"x_0": output.x_0.detach()}
        if output.generated is not None:
            inputs["generated"] = output.generated
        return MethodOutput(terms, inputs)

    def critic_losses(
        self, networks: Networks, batch: DistillBatch, output: MethodOutput, *, step: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Losses of the extras' own networks, from the step at which each extra starts."""
        found: dict[str, Tensor] = {}
        for extra in self._extras():
            if extra.acts_at(step):
                found |= extra.critic_losses(output.critic_inputs, networks, batch, step=step, generator=generator)
        return found

    def critic_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the extras' own networks."""
        for extra in self._extras():
            yield from extra.critic_parameters()

    def _extras(self) -> Iterator[ExtraTerm]:
        for extra in self.extras:
            assert isinstance(extra, ExtraTerm)  # noqa: S101  # ModuleList forgets the type
            yield extra

    def _distance(self, a: Tensor, b: Tensor) -> Tensor:
        if self.features is not None:
            found: Tensor = self.features(a, b)
            return found
        return distance(a, b, self.distance, c=self.huber_c)

    def _noise(self, networks: Networks, batch: DistillBatch, generator: torch.Generator) -> Tensor:
        """Standard normal (B, C, h, w) on the student's device, drawn where the generator is."""
        shape = (batch.batch_size, *batch.latent_shape)
        return torch.randn(shape, generator=generator, device=generator.device).to(_device(networks, batch))

    def _stage_one(
        self, networks: Networks, guide: GuidedTeacher, batch: DistillBatch, count: int, generator: torch.Generator
    ) -> tuple[Tensor, StudentOutput]:
        """Jumps to the segment's lower end from both ends of a short teacher move (section 4.1 of v6)."""
        schedule, device = networks.student.schedule, _device(networks, batch)
        times = draw_times(
            schedule, count, batch.batch_size, generator=generator, device=device, grouping=self.grouping
        )
        x_m = self._training_states(guide, batch, times, count, self._noise(networks, batch, generator))
        skip = self.skip * schedule.num_train_timesteps / 1000.0
        earlier = (from_clock(schedule, times.t_m) - skip).clamp(min=schedule.clean_t)
        t_n = torch.maximum(to_clock(schedule, earlier), times.t_s)
        x_n = guide.move(x_m, times.t_m, t_n, num_steps=self.teacher_steps)
        target = _target_jump(networks.target, batch, x_n, t_n, times.t_s)
        prediction = networks.student.predict(x_m, times.t_m, batch.condition)
        landed = jump(schedule, x_m, prediction, times.t_m, times.t_s)
        return self._distance(landed, target), StudentOutput(prediction.x_0, None)

    def _training_states(
        self, guide: GuidedTeacher, batch: DistillBatch, times: SegmentTimes, count: int, noise: Tensor
    ) -> Tensor:
        if self.states == "denoised":
            return denoised_states(guide, noise, times.t_m, count - times.segment)
        if batch.x_0 is None:
            raise ValueError("states='noised' needs clean latents in the batch; states='denoised' needs none")
        return guide.teacher.schedule.add_noise(batch.x_0, noise.to(batch.x_0), times.t_m)

    def _stage_two(
        self,
        plan: Refinement,
        networks: Networks,
        guide: GuidedTeacher,
        batch: DistillBatch,
        generator: torch.Generator,
    ) -> tuple[Tensor, StudentOutput]:
        """x_0 predicted from a milestone against x_0 predicted after p teacher steps over one segment."""
        schedule, device = networks.student.schedule, _device(networks, batch)
        eps = self._noise(networks, batch, generator)
        start = milestones(schedule, plan.student_steps)[1:].flip(0)  # T - i T / q, i < q
        generated = student_samples(networks.student, eps, start, batch.condition)
        drawn = draw_times(
            schedule, plan.num_segments, len(eps), generator=generator, device=device, grouping=self.grouping
        )
        borders = milestones(schedule, plan.num_segments)
        t_m, t_n = (borders[drawn.segment + end].to(drawn.t_m) for end in (1, 0))
        x_m = schedule.add_noise(generated, self._noise(networks, batch, generator), t_m)
        x_n = guide.move(x_m, t_m, t_n, num_steps=plan.teacher_steps)
        clean = torch.full_like(t_n, schedule.clean_t)
        target = _target_jump(networks.target, batch, x_n, t_n, clean)
        x_0 = networks.student.predict(x_m, t_m, batch.condition).x_0
        return self._distance(x_0, target), StudentOutput(x_0, generated)

    def _check_schedule(self, networks: Networks) -> None:
        own, given = self.schedule, networks.student.schedule
        if not torch.equal(milestones(own, GRID_SEGMENTS), milestones(given, GRID_SEGMENTS)):
            raise ValueError(
                f"the student runs on another clock (times {given.clean_t:g} to {given.terminal_t:g}) than the method "
                f"was made for ({own.clean_t:g} to {own.terminal_t:g}); pass schedule=student.schedule"
            )


@torch.no_grad()
def _target_jump(target: Denoiser, batch: DistillBatch, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The target's jump from t to s; samples that are there already keep their state and cost nothing."""
    moving = (t > s).nonzero()[:, 0]
    if not most_evaluations(target, min(1, len(moving))):
        return x_t
    # something moves on another rank alone: by weights that this one has a share of, and must evaluate, too
    rows = moving if len(moving) else torch.zeros(1, dtype=torch.int64, device=t.device)
    condition = batch.condition if batch.condition.batch_size in (None, 1) else batch.condition[rows]
    x, here, there = x_t[rows], t[rows], s[rows]
    prediction = target.predict(x, here, condition)
    forget_casts()  # the student, which may be the target itself, comes next
    if not len(moving):
        return x_t
    landed = jump(target.schedule, x, prediction, here, there)
    return x_t.to(landed.dtype).index_copy(0, moving, landed)


def _device(networks: Networks, batch: DistillBatch) -> torch.device:
    """Where to work: the device of the condition, of the latents, or of the student's weights."""
    given = batch.condition.embeds if batch.condition.embeds is not None else batch.condition.spatial
    if given is None:
        given = batch.x_0
    if given is None:
        given = next(networks.student.parameters(), None)
    return torch.device("cpu") if given is None else given.device
