"""Networks that a method can only be given once the teacher exists: discriminators, the fake score network."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

from distill.adapters import AdapterView, LoraSettings, adapter_parameters, add_lora
from distill.denoiser import Denoiser
from distill.method import DistillationMethod, Networks
from distill.methods.discriminator import STAGES, Discriminator, DiscriminatorKind, Stage, make_discriminator
from distill.methods.distribution_matching import DistributionMatching
from distill.methods.mlcm import MLCM
from layton.ladd import LADD

FAKE = "fake"


@dataclass(frozen=True)  # no slots: as a default argument, jsonargparse reads it by vars()
class CriticSettings:
    """What a method's own networks are made of.

    Attributes:
        kind: The discriminator: ``lora`` (a second adapter on the UNet's decoder, SCott's), ``full``, or ``heads``.
        conditional: Whether the discriminator is shown text and time.
        stages: Which of the UNet's stages it reads; None for all, or on a code decoder those after its control branch
            has joined, as before these nothing of the codes is to be seen.
        lora: Adapter of discriminator and fake score network; rank 64 when None.
    """

    kind: DiscriminatorKind = "lora"
    conditional: bool = True
    stages: tuple[Stage, ...] | None = None
    lora: LoraSettings | None = None


@runtime_checkable
class _TakesDiscriminator(Protocol):
    @property
    def needs_discriminator(self) -> bool: ...

    def attach(self, discriminator: Discriminator) -> None: ...


def attach_networks(method: DistillationMethod, networks: Networks, settings: CriticSettings) -> None:
    """Make the networks that a method asks for and give them to it; nothing for methods without any.

    With adapters they are further adapters on the one copy of the weights.

    Args:
        method: Any method.
        networks: Of the run.
        settings: See `CriticSettings`.

    Raises:
        ValueError: The network has no UNet to make a discriminator of.
    """
    matching = _distribution_matching(method)
    # First: a copy of the teacher shall have no adaptors of a discriminator in it.
    if matching is not None and matching.weight > 0:
        _attach_fake(matching, networks.teacher, settings.lora or LoraSettings())
    if isinstance(method, _TakesDiscriminator) and method.needs_discriminator:
        method.attach(
            make_discriminator(
                networks.teacher,
                settings.kind,
                lora=settings.lora,
                conditional=settings.conditional,
                stages=settings.stages or _default_stages(networks.teacher),
            )
        )


def _default_stages(teacher: Denoiser) -> tuple[Stage, ...]:
    network = teacher.denoiser if isinstance(teacher, AdapterView) else teacher
    return ("up",) if isinstance(network, LADD) else STAGES


def _distribution_matching(method: DistillationMethod) -> DistributionMatching | None:
    return method.extra(DistributionMatching) if isinstance(method, MLCM) else None  # noqa: S610  # no database


def _attach_fake(matching: DistributionMatching, teacher: Denoiser, settings: LoraSettings) -> None:
    if not isinstance(teacher, AdapterView):  # full fine-tuning: the copies are there to be adapted
        fake = copy.deepcopy(teacher).requires_grad_(True)
        if isinstance(fake, LADD) and fake.reader is not None:
            fake.reader.requires_grad_(False)
        matching.attach(fake)
        return
    add_lora(teacher.denoiser, settings, FAKE, active=False)
    fake = AdapterView(teacher.denoiser, (*teacher.names, FAKE))
    matching.attach(fake, trained=partial(adapter_parameters, teacher.denoiser, FAKE))
