"""Which text-to-image model an evaluation is about: LaytonGen, or any diffusers folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from generation.choice import SamplingChoice
from generation.commands.options import Weights, require_least, require_sampling

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from layton.commands.text_to_image import TextToImage

Kind = Literal["laytongen", "diffusion"]


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


def load_drawer(
    kind: Kind,
    name: str,
    *,
    student: str | None = None,
    planner: str | None = None,
    tokenizer: str | None = None,
    decoder: str | None = None,
    steps: int | None = None,
    sampling: SamplingChoice | None = None,
    weights: Weights | None = None,
    device: str | None = None,
    allow: Sequence[str] | None = None,
) -> Drawer:
    """Load a model of either kind.

    Args:
        kind: What the name means.
        name: Embedded model or folder.
        student: Export of `layton distill` on a diffusion model, or an embedded model with one; it draws as it was
            trained to.
        planner: LaytonGen whose planner says a diffusion model's prompts anew, with places.
        tokenizer: Of LaytonGen, where it does not lie beside the generator.
        decoder: Of LaytonGen.
        steps: Of the decoder, or of the diffusion model.
        sampling: What is asked for beside the model's defaults; of a diffusion model only a guidance scale.
        weights: Of LaytonGen's transformer while it draws; as they are saved by default.
        device: Where to run.
        allow: Prefixes of class names of parts of LaytonGen, or of the planner's, that may be loaded beside this
            library's.

    Raises:
        UsageError: If an option of the other kind is given, or one is out of range.
        ValueError: If the model does not exist or is damaged.
    """
    require_least(1, {"steps": steps})
    choice = sampling or SamplingChoice()
    require_sampling(choice)
    if kind == "laytongen":
        _refuse({"student": student, "planner": planner}, "a diffusion model's, not LaytonGen's")
        from generation.drawing import LaytonGenDrawer

        draw = LaytonGenDrawer.load(
            name,
            tokenizer=tokenizer,
            decoder=decoder,
            num_steps=steps,
            sampling=choice,
            weights=weights,
            device=device,
            allow=allow or (),
        )
        return Drawer(_SharedDraws(draw), draw.settings())
    others: dict[str, object] = {"tokenizer": tokenizer, "decoder": decoder, "weights": weights}
    others["allow"] = None if planner is not None else allow
    _refuse({**others, **dict.fromkeys(choice.given(), True)}, "LaytonGen's, not a diffusion model's")
    guidance_scale = choice.guidance_scale
    return _diffusion(name, student, planner, steps=steps, guidance_scale=guidance_scale, device=device, allow=allow)


def _refuse(options: Mapping[str, object], whose: str) -> None:
    from layton.errors import UsageError

    given = [option for option, value in options.items() if value is not None]
    if given:
        raise UsageError(f"{', '.join(given)}: {whose}")


def _diffusion(
    name: str,
    student: str | None,
    planner: str | None,
    *,
    steps: int | None,
    guidance_scale: float | None,
    device: str | None,
    allow: Sequence[str] | None,
) -> Drawer:
    from generation.placed_prompts import PlacedPrompts
    from layton.assets import find_pipeline
    from layton.commands.text_to_image import find_student
    from layton.errors import UsageError
    from layton.ldm.cache import digest
    from layton.ldm.text import knows_places
    from layton.modules import weights_digest

    folder = find_pipeline(name)
    draw = _text_to_image(folder, student, steps=steps, guidance_scale=guidance_scale, device=device)
    if planner is not None and not knows_places(draw.pipeline.tokenizer):
        raise UsageError(
            f"{name} has not learnt prompts with places: its tokenizer lacks their words, leave --planner out"
        )
    rewrite = None if planner is None else PlacedPrompts.from_pretrained(planner, allow=allow or ())
    settings = {
        "model": name,
        "weights": digest(folder),
        "pipeline_class": type(draw.pipeline).__name__,
        "scheduler": type(draw.pipeline.scheduler).__name__,
        "student": student,
        "student_weights": None if student is None else digest(find_student(student)),
        "num_inference_steps": draw.num_steps,
        "guidance_scale": draw.guidance_scale,
        "prompts_rewritten": planner is not None,
        "planner": planner,
        "planner_weights": None if rewrite is None else weights_digest(rewrite.text_encoder, rewrite.planner),
    }
    return Drawer(_SharedDraws(replace(draw, rewrite=rewrite)), settings)


def _text_to_image(
    folder: Path, student: str | None, *, steps: int | None, guidance_scale: float | None, device: str | None
) -> TextToImage:
    from layton.commands.text_to_image import DEFAULT_GUIDANCE, DEFAULT_STEPS, TextToImage, find_student
    from layton.errors import UsageError

    if student is not None:
        if guidance_scale is not None:
            raise UsageError("a student has a guidance of its own: leave --guidance-scale out")
        return TextToImage.load_student(folder, find_student(student), num_steps=steps, device=device)
    return TextToImage.load(
        folder,
        num_steps=DEFAULT_STEPS if steps is None else steps,
        guidance_scale=DEFAULT_GUIDANCE if guidance_scale is None else guidance_scale,
        device=device,
    )
