"""Any diffusers text-to-image folder, drawn from with one seed for each picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from layton import assets
from layton.pictures import to_uint8

Dtype = Literal["float32", "bfloat16"]
DEFAULT_STEPS = 25
DEFAULT_GUIDANCE = 3.0
STUDENT_FOLDER = "few_step"
TASKS_FOLDER = "one_step_tasks"  # a student that changes pictures


def find_student(name: str | Path, *, parts: Sequence[str] = (STUDENT_FOLDER,)) -> Path:
    """The folder of a distilled student: a path, or an embedded model or tokenizer with one in ``few_step/``.

    Args:
        name: The path or model.
        parts: Where in a model to look for it, in this order.

    Raises:
        ValueError: If there is no such folder or model.
    """
    folder = Path(name)
    if folder.is_dir():
        return next((folder / part for part in parts if (folder / part).is_dir()), folder)
    for part in parts[:-1]:
        try:
            return assets.resolve(name, part=part)
        except ValueError:
            continue
    return assets.resolve(name, part=parts[-1])


@dataclass(frozen=True, slots=True, eq=False)
class TextToImage:
    """A loaded pipeline and how it is sampled.

    Attributes:
        pipeline: The diffusers pipeline.
        num_steps: Denoising steps.
        guidance_scale: Of classifier-free guidance; 1 is none.
        student: Folder of the distilled student that draws in its teacher's pipeline, if it is one.
        rewrite: Makes of prompts and seeds the prompts that the pipeline gets instead.
        eta: Noise of a student's steps, for a pipeline that is told it.
    """

    pipeline: Any
    num_steps: int = DEFAULT_STEPS
    guidance_scale: float = DEFAULT_GUIDANCE
    student: str | None = None
    rewrite: Callable[[Sequence[str], Sequence[int]], list[str]] | None = None
    eta: float | None = None

    @classmethod
    def load_student(
        cls,
        folder: Path,
        export: Path,
        *,
        num_steps: int | None = None,
        device: str | None = None,
        dtype: Dtype = "float32",
    ) -> TextToImage:
        """A distilled student in its teacher's pipeline, sampled as it was trained to be.

        Args:
            folder: The teacher's.
            export: What training wrote.
            num_steps: One of the trained numbers of steps; the largest by default.
            device: Where to run.
            dtype: See `load`.

        Raises:
            ValueError: The student is not trained for so many steps or to draw from noise, or does not fit.
        """
        from layton.distillation.distilled import load_distilled, load_sampling, pipeline_arguments

        sampling = load_sampling(export)
        if sampling.start == "image":
            raise ValueError(
                f"{export} changes pictures and draws none from text: see layton.distillation.one_step_tasks"
            )
        steps = max(sampling.step_counts) if num_steps is None else num_steps
        arguments = pipeline_arguments(sampling, steps)
        scale = float(arguments["guidance_scale"])
        drawer = cls.load(folder, num_steps=steps, guidance_scale=scale, device=device, dtype=dtype)
        load_distilled(drawer.pipeline, export)
        return replace(drawer, student=str(export), eta=arguments.get("eta"))

    @classmethod
    def load(
        cls, folder: Path, *, num_steps: int, guidance_scale: float, device: str | None = None, dtype: Dtype = "float32"
    ) -> TextToImage:
        """Read a local pipeline folder; safetensors only, parts of known libraries, nothing of it is executed.

        Args:
            folder: The folder.
            num_steps: Denoising steps.
            guidance_scale: Of classifier-free guidance.
            device: Where to run; the accelerator if there is one.
            dtype: Type of all weights.

        Raises:
            ValueError: If it cannot be read, draws nothing from text, or a setting makes no sense.
        """
        if num_steps < 1 or not 0 <= guidance_scale < float("inf"):
            raise ValueError(f"need at least 1 step and a finite guidance >= 0, got {num_steps} and {guidance_scale}")
        import torch
        from diffusers import DiffusionPipeline
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

        from layton.devices import choose_device
        from layton.ldm.teacher import checked_index, load_parts

        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
        try:
            checked_index(folder)
            pipeline = load_parts(DiffusionPipeline, folder, {}, dtype=getattr(torch, dtype))
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder} is no diffusers pipeline that can be loaded: {error}") from error
        place = choose_device(device)
        if place.type == "cpu" and hasattr(getattr(pipeline, "vae", None), "enable_slicing"):
            pipeline.vae.enable_slicing()  # quicker there, see `layton.ldm.autoencoder.Autoencoder.decode`
        if hasattr(pipeline, "vae"):  # torch's own `to`: that of diffusers warns of an empty list of modules
            torch.nn.Module.to(pipeline.vae, getattr(torch, dtype))
        return cls(pipeline.to(place), num_steps, guidance_scale)

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[NDArray[np.uint8]]:
        """One image for each prompt and seed, which depends on these two alone.

        Args:
            prompts: Texts.
            seeds: As many.

        Returns:
            uint8 (H, W, 3) each.
        """
        import torch

        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        if hasattr(self.pipeline.scheduler, "noise_generators"):  # whose pipeline hands it none
            self.pipeline.scheduler.noise_generators = generators
        result = self.pipeline(
            prompt=list(prompts) if self.rewrite is None else self.rewrite(prompts, seeds),
            generator=generators,
            num_inference_steps=self.num_steps,
            guidance_scale=self.guidance_scale,
            output_type="np",
            **({} if self.eta is None else {"eta": self.eta}),
        )
        return to_uint8(np.asarray(result.images))
