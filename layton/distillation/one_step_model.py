"""A text-to-image model of one step, in the parts that editing, inpainting and super-resolution need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distill.condition import Condition
from distill.denoiser import Denoiser
from distill.few_step import FewStepSampling, Start
from distill.models import denoiser_from_pipeline
from distill.noise import Generators
from layton.assets import find_pipeline
from layton.devices import choose_device
from layton.distillation.distilled import load_distilled
from layton.distillation.one_step_tasks import Decode, Encode, edit, inpaint, super_resolve
from layton.ldm.autoencoder import Autoencoder
from layton.ldm.conditions import PromptEncoder, latent_shape_of
from layton.ldm.drawing import STUDENT_FOLDER, TASKS_FOLDER, find_student
from layton.ldm.teacher import open_pipeline
from layton.ldm.text import hears_places
from layton.scenes import Scene, caption
from layton.scenes.placed import placed_caption


def _nothing(prompt: str) -> Sequence[str]:
    return ()


@dataclass(frozen=True, slots=True, eq=False)
class OneStepModel:
    """A text-to-image model of one step, in the parts that the tasks need.

    Attributes:
        denoiser: The network.
        encode: Images to scaled latents.
        decode: Back.
        condition_of: Prompts to their condition.
        image_size: Side in pixels of what it draws.
        device: Where it is.
        say: A scene as the model has learnt to be told of it.
        start: What it starts from, see `distill.few_step.FewStepSampling`.
        unread: Words of a prompt that its text encoder has no tokens for.
    """

    denoiser: Denoiser
    encode: Encode
    decode: Decode
    condition_of: Callable[[Sequence[str]], Condition]
    image_size: int
    device: str = "cpu"
    say: Callable[[Scene], str] = caption
    start: Start = "noise"
    unread: Callable[[str], Sequence[str]] = _nothing

    def edit(
        self,
        images: Tensor,
        prompts: Sequence[str],
        present: Sequence[str] | None,
        *,
        generator: Generators,
        t: float,
        strength: float,
        threshold: float,
        softness: int,
    ) -> Tensor:
        """`layton.distillation.one_step_tasks.edit` to what prompts say; ``present`` says what is there now."""
        condition = self.condition_of(prompts)
        return edit(
            self.denoiser,
            images.to(self.device),
            condition,
            condition if present is None else self.condition_of(present),
            encode=self.encode,
            decode=self.decode,
            generator=generator,
            start=self.start,
            t=t,
            strength=strength,
            threshold=threshold,
            softness=softness,
        ).cpu()

    def inpaint(
        self, images: Tensor, masks: Tensor, prompts: Sequence[str], *, generator: Generators, t: float
    ) -> Tensor:
        """`layton.distillation.one_step_tasks.inpaint` with what prompts say of the whole picture."""
        return inpaint(
            self.denoiser,
            images.to(self.device),
            masks.to(self.device),
            self.condition_of(prompts),
            encode=self.encode,
            decode=self.decode,
            generator=generator,
            start=self.start,
            t=t,
        ).cpu()

    def super_resolve(
        self, images: Tensor, prompts: Sequence[str], *, generator: Generators, scale: int, t: float, strength: float
    ) -> Tensor:
        """`layton.distillation.one_step_tasks.super_resolve` of pictures that prompts describe."""
        return super_resolve(
            self.denoiser,
            images.to(self.device),
            self.condition_of(prompts),
            encode=self.encode,
            decode=self.decode,
            generator=generator,
            start=self.start,
            scale=scale,
            t=t,
            strength=strength,
        ).cpu()


def load_one_step_model(pipeline: str, student: str | None, *, device: str | None = None) -> OneStepModel:
    """A pipeline, and a distilled student in it, as one-step tasks need it.

    Args:
        pipeline: Embedded model or folder.
        student: Folder, or embedded model with one in ``one_step_tasks/`` or ``few_step/``; None takes the network of
            the pipeline itself.
        device: Where to run; the accelerator if there is one.

    Raises:
        UsageError: There is no such pipeline.
        ValueError: The student does not fit it, predicts something else, or was not trained for one step.
    """
    folder = find_pipeline(pipeline)
    pipe = open_pipeline(folder)
    scheduler = pipe.scheduler
    sampling: FewStepSampling | None = None
    if student is not None:
        sampling = load_distilled(pipe, find_student(student, parts=(TASKS_FOLDER, STUDENT_FOLDER)))
        sampling.times_for(1)
        pipe.register_modules(scheduler=scheduler)  # the schedule of the noise, which the student shares
    denoiser = denoiser_from_pipeline(pipe)
    if sampling is not None and sampling.prediction != denoiser.prediction_type:
        raise ValueError(f"{student} predicts {sampling.prediction} and {pipeline} {denoiser.prediction_type}")
    place = str(choose_device(device))
    _, height, width = latent_shape_of(pipe)
    autoencoder = Autoencoder(pipe.vae).eval().to(place)
    encoder = PromptEncoder(pipe, latent_size=(height, width))

    told = None if sampling is None else sampling.guidance

    def condition_of(texts: Sequence[str]) -> Condition:
        condition = encoder(texts, device=place)
        return condition if told is None else replace(condition, guidance=torch.full((len(texts),), told, device=place))

    return OneStepModel(
        denoiser.eval().to(place),
        autoencoder.encode,
        autoencoder.decode,
        condition_of,
        image_size=height * autoencoder.downsample_factor,
        device=place,
        say=placed_caption if hears_places(folder) else caption,
        start="noise" if sampling is None else sampling.start,
        unread=encoder.unread,
    )
