"""The border of every distillation method: what it is given, what it returns, what it declares.

A method is written once against `Denoiser` and serves text-to-image teachers and Layton's token-conditioned decoder
alike. It knows nothing of optimizers, files or prompts: a training task makes `Networks` and `DistillBatch`, asks for
the terms of the loss, and steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor, nn

from distill.denoiser import Condition, Denoiser

NO_TENSORS: Mapping[str, Tensor] = MappingProxyType({})


@dataclass(frozen=True, slots=True, eq=False)
class Networks:
    """The networks of one run. With LoRA all three are views of one copy of the weights."""

    student: Denoiser  # trained
    teacher: Denoiser  # frozen and unguided; methods add guidance and call it without gradients
    target: Denoiser  # gives the consistency target: an average of the student, or the student itself; no gradients


@dataclass(frozen=True, slots=True, eq=False)
class DistillBatch:
    """Conditions, and clean latents where there are any.

    Raises:
        ValueError: ``x_0`` does not have ``latent_shape``, or its batch is not the condition's; ``noise`` comes without
            ``x_0`` or is shaped unlike it.
    """

    condition: Condition  # of batch size B
    null: Condition  # what guidance guides away from, batch size B or 1; empty where the use knows no guidance
    latent_shape: tuple[int, ...]  # (C, h, w)
    x_0: Tensor | None = None  # (B, C, h, w) clean latents; None in image-free training
    noise: Tensor | None = None  # (B, C, h, w) what a teacher turned into x_0, or what the student is to; only in pairs
    size: int | None = None  # B, where neither an unconditional network's condition nor clean latents say it

    def __post_init__(self) -> None:
        if self.noise is not None and (self.x_0 is None or self.noise.shape != self.x_0.shape):
            given = None if self.x_0 is None else tuple(self.x_0.shape)
            raise ValueError(f"noise must be shaped like its x_0 {given}, got {tuple(self.noise.shape)}")
        if self.x_0 is not None and tuple(self.x_0.shape) != (self.batch_size, *self.latent_shape):
            raise ValueError(f"x_0 must be {(self.batch_size, *self.latent_shape)}, got {tuple(self.x_0.shape)}")

    @property
    def batch_size(self) -> int:
        """B."""
        size = self.condition.batch_size
        if size is None and self.x_0 is not None:
            size = len(self.x_0)
        if size is None:
            size = self.size
        if size is None:
            raise ValueError("a batch needs a condition, clean latents or a size: how many samples it is of is unknown")
        return size


@dataclass(frozen=True, slots=True, eq=False)
class MethodOutput:
    """Terms of the student's loss, and what the critic needs to learn from the same samples."""

    terms: dict[str, Tensor]  # unweighted, each ()
    critic_inputs: Mapping[str, Tensor] = field(default_factory=lambda: NO_TENSORS)  # detached


class DistillationMethod(nn.Module, ABC):
    """One way to turn a teacher into a student of few steps.

    Attributes:
        needs_latents: Whether batches must carry ``x_0``.
        target_decay: Decay of the averaged target network; None: the student is its own target.
        needs_null: Whether guidance of the teacher needs ``batch.null``.
        sampling: How the student is sampled: fresh noise between its steps, or deterministic ones.
        keeps_weights: Whether it evaluates a network with weights of its own keeping: such cannot be shared out.
    """

    needs_latents: bool = False
    needs_null: bool = True
    target_decay: float | None = None
    sampling: Literal["renoise", "ddim"] = "renoise"
    keeps_weights: bool = False

    def prepare(self, networks: Networks) -> None:
        """Called once, before the optimizers are made and anything is saved; for methods that add to the networks."""

    @property
    def weights(self) -> Mapping[str, float]:
        """Factor of each term in the student's loss; 1 where absent."""
        return {}

    @property
    def parts(self) -> Mapping[str, int]:
        """First optimizer step of each later part, by its name and the option that says it; empty if all are alike."""
        return {}

    @abstractmethod
    def losses(self, networks: Networks, batch: DistillBatch, *, step: int, generator: torch.Generator) -> MethodOutput:
        """Terms of the student's loss on one batch.

        Args:
            networks: Student, teacher and target.
            batch: Conditions and perhaps latents.
            step: Number of the optimizer step, 0-based (for progressive strategies and delayed starts).
            generator: The only source of random numbers.

        Raises:
            ValueError: The batch lacks what the method needs.
        """

    def critic_losses(
        self, networks: Networks, batch: DistillBatch, output: MethodOutput, *, step: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Terms of the loss of the method's own networks (discriminator, fake score); empty without any.

        Called after the student's step, on what `losses` left in ``critic_inputs``; no gradient reaches the student.
        """
        return {}

    def critic_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the method's own networks, trained by a second optimizer."""
        return iter(())

    @abstractmethod
    def inference_times(self, num_steps: int) -> Tensor:
        """Times (N,) float64, noisiest first, at which the trained student is evaluated in ``num_steps`` steps.

        Raises:
            ValueError: The student is not trained for so many steps.
        """

    @property
    @abstractmethod
    def step_counts(self) -> tuple[int, ...]:
        """Numbers of steps that the student is trained for."""

    @property
    def trained_counts(self) -> tuple[int, ...]:
        """Those of ``step_counts`` that the student can do by now, or others that it can do instead."""
        return self.step_counts
