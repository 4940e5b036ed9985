"""Which text-to-image model an evaluation is about: LaytonGen, or any diffusers folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from generation.choice import SamplingChoice
from generation.commands.options import Weights, require_least, require_sampling

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Kind = Literal["laytongen", "diffusion"]


class Draws(Protocol):
    """``(texts, seeds) -> images`` uint8 (H, W, 3), each of which depends on its own text and seed alone."""

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[NDArray[np.uint8]]:
        """Draw one image for each prompt and seed."""


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
        tokenizer: Of LaytonGen, where it does not lie beside the generator.
        decoder: Of LaytonGen.
        steps: Of the decoder, or of the diffusion model.
        sampling: What is asked for beside the model's defaults; of a diffusion model only a guidance scale.
        weights: Of LaytonGen's transformer while it draws; as they are saved by default.
        device: Where to run.
        allow: Prefixes of class names of LaytonGen's parts that may be loaded beside this library's.

    Raises:
        UsageError: If an option of LaytonGen is given for a diffusion model, or one is out of range.
        ValueError: If the model does not exist or is damaged.
    """
    from layton.errors import UsageError

    require_least(1, {"steps": steps})
    choice = sampling or SamplingChoice()
    require_sampling(choice)
    if kind == "laytongen":
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
        return Drawer(draw, draw.settings())
    others = {"tokenizer": tokenizer, "decoder": decoder, "weights": weights, "allow": allow}
    given = [name for name, value in others.items() if value is not None] + choice.given()
    if given:
        raise UsageError(f"{', '.join(given)}: LaytonGen's, not a diffusion model's")
    from layton.commands.text_to_image import DEFAULT_GUIDANCE, DEFAULT_STEPS, TextToImage, find_pipeline
    from layton.ldm.cache import digest

    folder = find_pipeline(name)
    other = TextToImage.load(
        folder,
        num_steps=DEFAULT_STEPS if steps is None else steps,
        guidance_scale=DEFAULT_GUIDANCE if choice.guidance_scale is None else choice.guidance_scale,
        device=device,
    )
    settings = {
        "model": name,
        "weights": digest(folder),
        "pipeline_class": type(other.pipeline).__name__,
        "scheduler": type(other.pipeline.scheduler).__name__,
        "num_inference_steps": other.num_steps,
        "guidance_scale": other.guidance_scale,
        "prompts_rewritten": False,
    }
    return Drawer(other, settings)
