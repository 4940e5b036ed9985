"""Optional terms of a distillation loss: each judges the student's ``x_0`` and is one switch with one weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from distill.method import DistillBatch, Networks


@dataclass(frozen=True, slots=True, eq=False)
class StudentOutput:
    """What the student made in this step, for extra terms to judge."""

    x_0: Tensor  # (B, C, h, w) one-step prediction, with gradients to the student
    generated: Tensor | None  # (B, C, h, w) few-step samples of the student, detached; None in stage 1


class ExtraTerm(nn.Module, ABC):
    """A term beside consistency: preference, distribution matching, adversarial.

    Args:
        weight: Factor in the student's loss; 0 turns the term off.
        start: First optimizer step at which the term acts; before, it is zero and costs nothing. None: from the second
            stage on, if the method has one, as in TLCM (arXiv 2406.05768 v6), else from the first step.

    Raises:
        ValueError: Negative weight or start.

    Attributes:
        name: Of the term in losses and logs; a method has at most one of each.
        needs_null: Whether it guides the teacher.
    """

    name: ClassVar[str]
    needs_null: bool = False

    def __init__(self, *, weight: float, start: int | None = None) -> None:
        super().__init__()
        if weight < 0 or (start is not None and start < 0):
            raise ValueError(f"weight and start must be >= 0, got {weight} and {start}")
        self.weight, self.start = weight, start or 0
        self._told = start is not None

    def begin_by_default(self, step: int) -> None:
        """Let a term whose ``start`` was left open begin at an optimizer step."""
        if not self._told:
            self.start = step

    def acts_at(self, step: int) -> bool:
        """Whether the term takes part in an optimizer step."""
        return self.weight > 0 and step >= self.start

    @abstractmethod
    def student_loss(
        self, output: StudentOutput, networks: Networks, batch: DistillBatch, *, step: int, generator: torch.Generator
    ) -> Tensor:
        """The unweighted term, (); asked only from step ``start`` on."""

    def critic_losses(
        self,
        inputs: Mapping[str, Tensor],
        networks: Networks,
        batch: DistillBatch,
        *,
        step: int,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """Losses of the term's own networks by name; see ``DistillationMethod.critic_losses``.

        Args:
            inputs: ``x_0`` and, where there are any, ``generated`` of `StudentOutput`, detached.
            networks: As in ``DistillationMethod.losses``.
            batch: The batch ``inputs`` were made from.
            step: Number of the optimizer step.
            generator: The only source of random numbers.
        """
        return {}

    def critic_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the term's own networks."""
        return iter(())
