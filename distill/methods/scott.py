"""SCott (arXiv 2403.01505): stochastic consistency distillation with an adversary, for one to four steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distill.method import DistillBatch, MethodOutput, Networks
from distill.methods.consistency import BoundaryKind, ConsistencyMethod, ConsistencySettings, DistanceKind, distance
from distill.methods.discriminator import Discriminator, draw_renoising, hinge_critic_loss, hinge_generator_loss
from distill.moves import SolverSettings
from distill.schedules import NoiseSchedule


@dataclass(frozen=True)  # no slots: as a default argument, jsonargparse reads it by vars()
class Adversary:
    """The adversarial term.

    Attributes:
        weight: Its factor in the student's loss; 0 does without a discriminator.
        start: First optimizer step of the student that feels it; the critic learns from the first step on.
        renoise_range: Part of the clock from which the discriminator's noise levels are drawn. The paper does not say
            how its discriminator's input is noised.

    Raises:
        ValueError: A value out of range.
    """

    weight: float = 0.4
    start: int = 0
    renoise_range: tuple[float, float] = (0.02, 0.98)

    def __post_init__(self) -> None:
        if self.weight < 0.0 or self.start < 0:
            raise ValueError(f"weight and start must be >= 0, got {self.weight} and {self.start}")
        if not 0.0 <= self.renoise_range[0] <= self.renoise_range[1] <= 1.0:
            raise ValueError(f"renoise_range must be (low, high) inside [0, 1], got {self.renoise_range}")


class SCott(ConsistencyMethod):
    """Agreement along a stochastic trajectory of the teacher, and a discriminator on the student's answer.

    Terms: ``consistency`` and, with a discriminator, ``adversarial`` (weight 0.4); the critic's: ``critic``.

    ================================  ==========================================================
    row of the paper's ablations      here
    ================================  ==========================================================
    ODE solver in place of the SDE    ``solver=SolverSettings("ddim")``
    DDIM with eta                     ``solver=SolverSettings("ddim", eta=0.2)``
    one teacher step, h = 1           ``num_sub_steps=1``
    no discriminator                  ``adversary=Adversary(weight=0.0)``
    full, LoRA, unconditional critic  the ``Discriminator`` that is attached
    ================================  ==========================================================

    Args:
        skip: ``t_n - t_m``, 24 of 1000 training times.
        num_sub_steps: h, solver steps of the teacher per move.
        solver: The teacher's solver; by default first-order ER-SDE with ``sde_5``, the mild one.
        num_points: Points of the grid of start times; not stated in the paper. All times by default, because moves of
            24 from a grid of 50 would land between the times that are trained.
        guidance_range: Scales in diffusers' convention; the paper's range is not known, this is LCM's.
        condition_on_guidance: Tell the student the scale, as the paper does; not with LoRA.
        distance: ``pseudo_huber`` or ``l2``; the accounts of the paper differ.
        boundary: ``lcm`` or ``none``.
        target_decay: Decay of the averaged target; None: the student is its own target.
        adversary: The adversarial term.
        schedule: The student's schedule; by default Stable Diffusion's.
        step_counts: Numbers of steps to offer.

    Raises:
        ValueError: A value out of range.
    """

    def __init__(
        self,
        *,
        skip: float = 24.0,
        num_sub_steps: int = 3,
        solver: SolverSettings = SolverSettings("er_sde"),  # noqa: B008  # immutable
        num_points: int = 1000,
        guidance_range: tuple[float, float] = (3.0, 15.0),
        condition_on_guidance: bool = False,
        distance: DistanceKind = "pseudo_huber",
        boundary: BoundaryKind = "lcm",
        target_decay: float | None = 0.95,
        adversary: Adversary = Adversary(),
        schedule: NoiseSchedule | None = None,
        step_counts: Sequence[int] = (1, 2, 3, 4, 5, 6, 7, 8),
    ) -> None:
        settings = ConsistencySettings(
            num_points=num_points,
            skip=skip,
            num_sub_steps=num_sub_steps,
            guidance_range=guidance_range,
            condition_on_guidance=condition_on_guidance,
            distance=distance,
            boundary=boundary,
        )
        super().__init__(settings, solver.make(), target_decay=target_decay, schedule=schedule, step_counts=step_counts)
        self.adversary = adversary
        self.discriminator: Discriminator | None = None

    @property
    def needs_discriminator(self) -> bool:
        """Whether a discriminator must be attached before training."""
        return self.adversary.weight > 0.0

    def attach(self, discriminator: Discriminator) -> None:
        """Take the discriminator, which can only be made once the networks exist.

        Raises:
            ValueError: This run does without one.
        """
        if not self.needs_discriminator:
            raise ValueError("the adversary's weight is 0: a discriminator would have no effect")
        self.discriminator = discriminator

    @property
    def parts(self) -> Mapping[str, int]:
        """See `DistillationMethod.parts`."""
        late = self.needs_discriminator and self.adversary.start > 0
        return {"the adversarial term (adversary.start)": self.adversary.start} if late else {}

    @property
    def weights(self) -> Mapping[str, float]:
        """See ``DistillationMethod.weights``."""
        return {"adversarial": self.adversary.weight} if self.needs_discriminator else {}

    def losses(self, networks: Networks, batch: DistillBatch, *, step: int, generator: torch.Generator) -> MethodOutput:
        """The terms ``consistency`` and ``adversarial``; see ``DistillationMethod.losses``.

        Raises:
            ValueError: The adversarial term has a weight and no discriminator is attached.
        """
        pair = self.agree(networks, batch, generator)
        terms = {"consistency": distance(pair.found, pair.wanted, self.settings.distance)}
        if not self.needs_discriminator:
            return MethodOutput(terms)
        if step >= self.adversary.start:
            critic = self._critic()
            with critic.frozen():
                (scores,) = self._scores(critic, batch, generator, pair.found)
            terms["adversarial"] = hinge_generator_loss(scores)
        return MethodOutput(terms, {"fake": pair.found.detach()})

    def critic_losses(
        self, networks: Networks, batch: DistillBatch, output: MethodOutput, *, step: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The term ``critic``: hinge loss of data against the student's answers, at equal times and noise."""
        if not self.needs_discriminator or batch.x_0 is None:
            return {}
        real, fake = self._scores(self._critic(), batch, generator, batch.x_0, output.critic_inputs["fake"])
        return {"critic": hinge_critic_loss(real, fake)}

    def critic_parameters(self) -> Iterator[nn.Parameter]:
        """The discriminator's learning parameters."""
        return iter(()) if self.discriminator is None else self.discriminator.trainable_parameters()

    def _critic(self) -> Discriminator:
        if self.discriminator is None:
            raise ValueError("the adversarial term needs a discriminator: call attach, or set the adversary's weight 0")
        return self.discriminator

    def _scores(
        self, critic: Discriminator, batch: DistillBatch, generator: torch.Generator, *samples: Tensor
    ) -> list[tuple[Tensor, ...]]:
        """Scores of batches of clean latents, all noised alike, one evaluation each (the peak memory is the point)."""
        schedule = critic.features.schedule
        t, noise = draw_renoising(schedule, samples[0], generator, self.adversary.renoise_range)
        noisy = [schedule.add_noise(x_0, noise, t) for x_0 in samples]
        return [critic(x_t, t, batch.condition, batch.null) for x_t in noisy]
