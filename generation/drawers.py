"""Which text-to-image model draws: LaytonGen, or any diffusers folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from generation.model.weight_types import Weights
from generation.sampling.choice import SamplingChoice, require_sampling
from layton.options import refuse_given, require_least

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from layton.ldm.drawing import TextToImage

Kind = Literal["laytongen", "diffusion"]


@dataclass(frozen=True, slots=True)
class DrawerOptions:
    """Which text-to-image model draws.

    Attributes:
        model: embedded model or folder.
        kind: laytongen, or diffusion for a diffusers text-to-image folder.
        student: export of `layton distill` on a diffusers pipeline, or mini; it draws as it was trained to.
        planner: embedded model or folder of a LaytonGen, whose planner says prompts anew with places, for a diffusion
            model that learnt such prompts.
        tokenizer: of LaytonGen, where it does not lie beside the generator.
        decoder: name of LaytonGen's code decoder; the tokenizer's own choice by default.
        steps: of LaytonGen's decoder, of a student, or of the diffusion model (25); their own number by default.
        weights: type while it draws: bf16, or int8 of LaytonGen on a CPU; by default LaytonGen's as saved, else fp32.
        device: where to run; the accelerator if there is one.
        allow: dotted names, or their beginnings, of classes of your own that a saved part may name.
    """

    model: str = "mini"
    kind: Kind = "laytongen"
    student: str | None = None
    planner: str | None = None
    tokenizer: str | None = None
    decoder: str | None = None
    steps: int | None = None
    weights: Weights | None = None
    device: str | None = None
    allow: list[str] | None = None


class Draws(Protocol):
    """``(texts, seeds) -> images`` uint8 (H, W, 3), each of which depends on its own text and seed alone."""

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[NDArray[np.uint8]]:
        """Draw one image for each prompt and seed."""


@dataclass(frozen=True, slots=True, eq=False)
class _SharedDraws:
    """Draws a part of the images in each of several processes, and has all of them in every one."""

    draw: Draws

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[NDArray[np.uint8]]:
        from layton.ranks import all_gather_items, own_share

        own = own_share(list(zip(prompts, seeds, strict=True)))
        drawn = self.draw([prompt for prompt, _ in own], [seed for _, seed in own]) if own else []
        return all_gather_items(drawn)


@dataclass(frozen=True, slots=True, eq=False)
class Drawer:
    """A loaded model and every setting that decides its pictures.

    Attributes:
        draw: Draws.
        settings: Plain values, for protocols.
    """

    draw: Draws
    settings: dict[str, Any]


def load_drawer(options: DrawerOptions, sampling: SamplingChoice | None = None) -> Drawer:
    """Load a model of either kind.

    Args:
        options: Which.
        sampling: What is asked for beside the model's defaults; of a diffusion model only a guidance scale.

    Raises:
        UsageError: If an option of the other kind is given, or one is out of range.
        ValueError: If the model does not exist or is damaged.
    """
    require_least(1, {"steps": options.steps})
    choice = sampling or SamplingChoice()
    require_sampling(choice)
    if options.kind == "laytongen":
        refuse_given(
            {"student": options.student, "planner": options.planner},
            "a diffusion model's, not LaytonGen's: say --kind diffusion",
        )
        from generation.drawing import LaytonGenDrawer

        draw = LaytonGenDrawer.load(
            options.model,
            tokenizer=options.tokenizer,
            decoder=options.decoder,
            num_steps=options.steps,
            sampling=choice,
            weights=options.weights,
            device=options.device,
            allow=options.allow or (),
        )
        return Drawer(_SharedDraws(draw), draw.settings())
    others: dict[str, object] = {name: getattr(options, name) for name in ("tokenizer", "decoder")}
    others["weights int8"] = True if options.weights == "int8" else None
    others["allow"] = None if options.planner is not None else options.allow
    refuse_given({**others, **dict.fromkeys(choice.given(), True)}, "LaytonGen's, not a diffusion model's")
    return _diffusion(options, choice.guidance_scale)


def _diffusion(options: DrawerOptions, guidance_scale: float | None) -> Drawer:
    from generation.placed_prompts import PlacedPrompts
    from layton.assets import find_pipeline
    from layton.errors import UsageError
    from layton.ldm.cache import digest
    from layton.ldm.drawing import find_student
    from layton.ldm.text import knows_places
    from layton.modules import weights_digest

    name, student, planner = options.model, options.student, options.planner
    folder = find_pipeline(name)
    draw = _text_to_image(folder, options, guidance_scale)
    if planner is not None and not knows_places(draw.pipeline.tokenizer):
        raise UsageError(
            f"{name} has not learnt prompts with places: its tokenizer lacks their words, leave --planner out"
        )
    rewrite = (
        None
        if planner is None
        else PlacedPrompts.from_pretrained(planner, allow=options.allow or (), device=options.device)
    )
    settings = {
        "model": name,
        "weights": digest(folder),
        "pipeline_class": type(draw.pipeline).__name__,
        "scheduler": type(draw.pipeline.scheduler).__name__,
        "student": student,
        "student_weights": None if student is None else digest(find_student(student)),
        "num_inference_steps": draw.num_steps,
        "guidance_scale": draw.guidance_scale,
        "weight_type": options.weights or "fp32",
        "prompts_rewritten": planner is not None,
        "planner": planner,
        "planner_weights": None if rewrite is None else weights_digest(rewrite.text_encoder, rewrite.planner),
    }
    return Drawer(_SharedDraws(replace(draw, rewrite=rewrite)), settings)


def _text_to_image(folder: Path, options: DrawerOptions, guidance_scale: float | None) -> TextToImage:
    from layton.errors import UsageError
    from layton.ldm.drawing import DEFAULT_GUIDANCE, DEFAULT_STEPS, Dtype, TextToImage, find_student

    steps, device = options.steps, options.device
    dtype: Dtype = "bfloat16" if options.weights == "bf16" else "float32"
    if options.student is not None:
        if guidance_scale is not None:
            raise UsageError("a student has a guidance of its own: leave --guidance-scale out")
        return TextToImage.load_student(
            folder, find_student(options.student), num_steps=steps, device=device, dtype=dtype
        )
    return TextToImage.load(
        folder,
        num_steps=DEFAULT_STEPS if steps is None else steps,
        guidance_scale=DEFAULT_GUIDANCE if guidance_scale is None else guidance_scale,
        device=device,
        dtype=dtype,
    )
