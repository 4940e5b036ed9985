"""Distribution matching: the student's samples should be the teacher's in distribution (arXiv 2406.05768, section 4.5).

Score distillation against a fake network that follows the student (DMD2, arXiv 2405.14867). Its adversarial companion
is `distill.methods.adversarial`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from einops import reduce
from torch import Tensor, nn

from distill.denoiser import Denoiser
from distill.held import Held
from distill.method import DistillBatch, Networks
from distill.methods.consistency import forget_casts
from distill.methods.discriminator import draw_renoising
from distill.methods.extra_terms import ExtraTerm, StudentOutput
from distill.methods.mlcm_states import GuidedTeacher

FakeSamples = Literal["generated", "x_0"]


def distribution_matching_gradient(x_0: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """DMD's descent direction ``(p_real - p_fake) / mean|p_real|`` with ``p = x_0 - estimate``, all (B, C, h, w).

    ``real`` and ``fake`` are clean estimates of the teacher and of the fake network at one noised ``x_0``; moving
    against the result moves from what the student makes towards what the teacher would. (DMD2 ``sd_guidance.py``.)
    """
    scale = reduce((x_0 - real).abs(), "b ... -> b", "mean").clamp(min=1e-6)
    return (fake - real) / scale.reshape(-1, *[1] * (x_0.ndim - 1))


class DistributionMatching(ExtraTerm):
    """DMD in the form of DMD2: gradient ``(x_0_fake - x_0_real) / mean|x_0 - x_0_real|`` at a noised ``x_0``.

    Cost of one sample on a step where it acts: teacher 2 F, fake 1 F; the fake network's own update 3 F at every step.

    Args:
        fake: Follows the distribution of the student's samples: a copy of the teacher, or the shared network under an
            adapter of its own. None: give it later with `attach`.
        trained: Gives what of ``fake`` is trained, whenever it is asked. For a shared network, which is then not
            registered here and is saved by its owner; None registers ``fake`` and trains all its parameters.
        weight: Factor in the student's loss; TLCM's is not published.
        start: First optimizer step; by default that of the second stage, if there is one.
        guidance_scale: w of the teacher (published 8); the fake network is never guided.
        t_range: Fractions of the noisiest time between which states are drawn (DMD2: 0.02 to 0.98).
        fake_updates: Updates of the fake network for each of the student by this term (DMD2: 5): the term acts on
            every so-many-th step and the critic learns on all.
        fake_samples: What the fake network learns on: ``generated`` are the samples of several steps (TLCM; falls back
            to the other in stage 1), ``x_0`` the one-step predictions that the term moves.

    Raises:
        ValueError: An argument out of range.
    """

    name: ClassVar[str] = "distribution_matching"

    def __init__(
        self,
        fake: Denoiser | None = None,
        *,
        trained: Callable[[], Iterable[nn.Parameter]] | None = None,
        weight: float = 1.0,
        start: int | None = None,
        guidance_scale: float = 8.0,
        t_range: tuple[float, float] = (0.02, 0.98),
        fake_updates: int = 5,
        fake_samples: FakeSamples = "generated",
    ) -> None:
        super().__init__(weight=weight, start=start)
        if not 0.0 <= t_range[0] < t_range[1] <= 1.0 or fake_updates < 1 or fake_samples not in get_args(FakeSamples):
            raise ValueError(
                f"need 0 <= low < high <= 1, fake_updates >= 1 and a known kind of samples; got t_range {t_range}, "
                f"fake_updates {fake_updates}, fake_samples {fake_samples!r}"
            )
        self.needs_null = guidance_scale > 1.0
        self.guidance_scale, self.t_range = guidance_scale, t_range
        self.fake_updates = fake_updates
        self.fake_samples: FakeSamples = fake_samples
        self._shared: Held[Denoiser] | None = None
        self._trained: Callable[[], Iterable[nn.Parameter]] = tuple  # of a shared network
        self.fake: Denoiser | None = None
        if fake is not None:
            self.attach(fake, trained=trained)

    def attach(self, fake: Denoiser, *, trained: Callable[[], Iterable[nn.Parameter]] | None = None) -> None:
        """Give the fake network; see the class. Before the critic's optimizer is made."""
        self._shared, self._trained = Held(fake), trained or tuple
        self.fake = fake if trained is None else None

    def _fake_network(self) -> Denoiser:
        if self._shared is None:
            raise ValueError("distribution matching has no fake network: attach one before training")
        return self._shared.module

    def student_loss(
        self, output: StudentOutput, networks: Networks, batch: DistillBatch, *, step: int, generator: torch.Generator
    ) -> Tensor:
        """``0.5 mean (x_0 - stopgrad(x_0 - gradient))^2``, (); zero on the steps left to the fake network."""
        fake = self._fake_network()
        if (step - self.start) % self.fake_updates:
            return output.x_0.new_zeros(())
        x_0 = output.x_0.float()
        guide = GuidedTeacher(networks.teacher, self.guidance_scale, batch.condition, batch.null)
        with torch.no_grad():
            t, eps = draw_renoising(networks.teacher.schedule, x_0, generator, self.t_range)
            x_t = networks.teacher.schedule.add_noise(x_0, eps, t)
            real = guide.predict(x_t, t).x_0
            estimate = fake.predict(x_t, t, batch.condition).x_0
            wanted = x_0 - distribution_matching_gradient(x_0, real, estimate)
        forget_casts()  # the fake network's, which learns next
        return 0.5 * F.mse_loss(x_0, wanted)

    def critic_losses(
        self,
        inputs: Mapping[str, Tensor],
        networks: Networks,
        batch: DistillBatch,
        *,
        step: int,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """``fake``: plain diffusion training of the fake network on the student's samples."""
        fake = self._fake_network()
        x_0 = inputs.get(self.fake_samples, inputs["x_0"]).float()
        t, eps = draw_renoising(fake.schedule, x_0, generator, self.t_range)
        prediction: Tensor = fake(fake.schedule.add_noise(x_0, eps, t), t, batch.condition)
        return {"fake": F.mse_loss(prediction.float(), fake.target(x_0, eps, t).float())}

    def critic_parameters(self) -> Iterator[nn.Parameter]:
        """The fake network's trained parameters."""
        return iter(self._trained()) if self.fake is None else self.fake.parameters()
