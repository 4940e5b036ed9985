"""Which text-to-image model an evaluation is about: LaytonGen, or any diffusers folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from generation.choice import SamplingChoice
from generation.commands.options import DrawerOptions, require_least, require_sampling

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from layton.commands.text_to_image import TextToImage


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
        _refuse({"student": options.student, "planner": options.planner}, "a diffusion model's, not LaytonGen's")
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
    _refuse({**others, **dict.fromkeys(choice.given(), True)}, "LaytonGen's, not a diffusion model's")
    return _diffusion(options, choice.guidance_scale)


def _refuse(options: Mapping[str, object], whose: str) -> None:
    from layton.errors import UsageError

    given = [option for option, value in options.items() if value is not None]
    if given:
        raise UsageError(f"{', '.join(given)}: {whose}")


def _diffusion(options: DrawerOptions, guidance_scale: float | None) -> Drawer:
    from generation.placed_prompts import PlacedPrompts
    from layton.assets import find_pipeline
    from layton.commands.text_to_image import find_student
    from layton.errors import UsageError
    from layton.ldm.cache import digest
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
    from layton.commands.text_to_image import DEFAULT_GUIDANCE, DEFAULT_STEPS, Dtype, TextToImage, find_student
    from layton.errors import UsageError

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
