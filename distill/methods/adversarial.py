"""The adversarial option of MLCM: a discriminator on noised latents that knows no images (arXiv 2406.05768, eq. 13).

The sign convention of the paper's equation is loose; the hinge loss is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal, get_args

from torch import Generator, Tensor, nn

from distill.method import DistillBatch, Networks
from distill.methods.discriminator import Discriminator, draw_renoising, hinge_critic_loss, hinge_generator_loss
from distill.methods.extra_terms import ExtraTerm, StudentOutput

RealSamples = Literal["generated", "latents"]


class Adversarial(ExtraTerm):
    """A discriminator tells one-step predictions from better samples, both noised.

    Args:
        discriminator: See `distill.methods.discriminator`; None: give it later with `attach`.
        weight: Factor in the student's loss (DMD2: 5e-3; TLCM's is not published).
        start: First optimizer step; by default that of the second stage, if there is one.
        real: What counts as real: ``generated``, the student's own samples of several steps (TLCM; in stage 1, which
            has none, the batch's latents), or ``latents``.
        t_range: Fractions of the noisiest time between which states are drawn.

    Raises:
        ValueError: Unknown ``real``, or an empty range.
    """

    name: ClassVar[str] = "adversarial"

    def __init__(
        self,
        discriminator: Discriminator | None = None,
        *,
        weight: float = 5e-3,
        start: int | None = None,
        real: RealSamples = "generated",
        t_range: tuple[float, float] = (0.02, 0.98),
    ) -> None:
        super().__init__(weight=weight, start=start)
        if real not in get_args(RealSamples) or not 0.0 <= t_range[0] < t_range[1] <= 1.0:
            raise ValueError(f"unknown real samples {real!r} or bad t_range {t_range}")
        self.discriminator = discriminator
        self.real: RealSamples = real
        self.t_range = t_range

    def attach(self, discriminator: Discriminator) -> None:
        """Take the discriminator, before the critic's optimizer is made."""
        self.discriminator = discriminator

    def student_loss(
        self, output: StudentOutput, networks: Networks, batch: DistillBatch, *, step: int, generator: Generator
    ) -> Tensor:
        """``-E D(noised x_0)``, (); gradients reach the student only."""
        critic = self._critic()
        schedule, x_0 = critic.features.schedule, output.x_0.float()
        t, eps = draw_renoising(schedule, x_0, generator, self.t_range)
        with critic.frozen():
            return hinge_generator_loss(critic(schedule.add_noise(x_0, eps, t), t, batch.condition, batch.null))

    def critic_losses(
        self,
        inputs: Mapping[str, Tensor],
        networks: Networks,
        batch: DistillBatch,
        *,
        step: int,
        generator: Generator,
    ) -> dict[str, Tensor]:
        """``discriminator``: real up, fake down, at the same times and noise.

        Raises:
            ValueError: There are no real samples: stage 1 without clean latents.
        """
        real = inputs.get("generated") if self.real == "generated" else None
        real = batch.x_0 if real is None else real
        if real is None:
            raise ValueError("the discriminator has no real samples: stage 1 needs clean latents in the batch")
        critic = self._critic()
        schedule, fake = critic.features.schedule, inputs["x_0"].float()
        t, eps = draw_renoising(schedule, fake, generator, self.t_range)
        real_scores, fake_scores = (
            critic(schedule.add_noise(x_0, eps, t), t, batch.condition, batch.null) for x_0 in (real.to(fake), fake)
        )
        return {"discriminator": hinge_critic_loss(real_scores, fake_scores)}

    def critic_parameters(self) -> Iterator[nn.Parameter]:
        """The discriminator's learning parameters."""
        return iter(()) if self.discriminator is None else self.discriminator.trainable_parameters()

    def _critic(self) -> Discriminator:
        if self.discriminator is None:
            raise ValueError("the adversarial term has no discriminator: attach one before training")
        return self.discriminator
