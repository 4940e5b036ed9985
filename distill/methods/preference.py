"""Preference learning through a differentiable scorer (arXiv 2406.05768, section 4.4: MPS)."""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from distill.condition import Condition
from distill.held import Held
from distill.method import DistillBatch, Networks
from distill.methods.extra_terms import ExtraTerm, StudentOutput


class Scorer(Protocol):
    """How well latents show what a condition asks for. Differentiable in the latents, with frozen weights.

    A scorer of images decodes first; its gradient then flows through the decoder. `layton.distillation.matcher` has
    both kinds.
    """

    def score(self, x_0: Tensor, condition: Condition) -> Tensor:
        """Scores (B,) of clean latents (B, C, h, w), larger is better, under conditions of batch size B."""


class PreferenceTerm(ExtraTerm):
    """``max(m - s(x_0, c), 0) + max(s(x_0, c') - n, 0)`` with c' an unrelated condition; published m = 16, n = 0.

    The unrelated conditions are those of other samples of the batch (a cyclic shift by a random amount), so that a
    batch of one has none and uses the first half only.

    Args:
        scorer: See `Scorer`; None: give it later with `attach`. It is not part of this module's parameters. MPS's
            scores are cosines scaled by about 100.
        weight: Factor in the student's loss; not published.
        start: First optimizer step; by default that of the second stage, if there is one.
        positive_margin: m; scores of the own condition above it are good enough.
        negative_margin: n; scores of unrelated conditions below it are bad enough.

    Raises:
        ValueError: ``negative_margin`` is not below ``positive_margin``.
    """

    name: ClassVar[str] = "preference"

    def __init__(
        self,
        scorer: Scorer | None = None,
        *,
        weight: float = 0.05,
        start: int | None = None,
        positive_margin: float = 16.0,
        negative_margin: float = 0.0,
    ) -> None:
        super().__init__(weight=weight, start=start)
        if not negative_margin < positive_margin:
            raise ValueError(f"margins must satisfy negative < positive, got {negative_margin} and {positive_margin}")
        self._scorer: Held[Scorer] | None = None
        if scorer is not None:
            self.attach(scorer)
        self.positive_margin, self.negative_margin = positive_margin, negative_margin

    def attach(self, scorer: Scorer) -> None:
        """Take the scorer, where it can be made only later."""
        self._scorer = Held(scorer)

    @property
    def networks(self) -> list[nn.Module]:
        """The scorer's networks, as far as they are its attributes, for those who count operations."""
        if self._scorer is None:
            return []
        scorer = self._scorer.module
        return [value for value in (scorer, *vars(scorer).values()) if isinstance(value, nn.Module)]

    def student_loss(
        self, output: StudentOutput, networks: Networks, batch: DistillBatch, *, step: int, generator: torch.Generator
    ) -> Tensor:
        """The margin loss, ().

        Raises:
            ValueError: No scorer is attached.
        """
        if self._scorer is None:
            raise ValueError("preference learning has no scorer: attach one before training")
        score = self._scorer.module.score
        positive = (self.positive_margin - score(output.x_0, batch.condition).float()).clamp(min=0.0)
        size = len(output.x_0)
        if size == 1 or batch.condition.batch_size != size:
            return positive.mean()
        shift = int(torch.randint(1, size, (), generator=generator, device=generator.device))
        others = batch.condition.map(lambda value: value.roll(shift, dims=0))
        negative = (score(output.x_0, others).float() - self.negative_margin).clamp(min=0.0)
        return (positive + negative).mean()
