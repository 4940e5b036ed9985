"""Prompts said anew with places, for text-to-image pipelines that learnt such prompts (`layton.scenes.placed`).

The planner of a LaytonGen decides where objects stand, and says it in words: "two red stars" becomes
"red star <24> <e6>, red star <22> <l10>". So a pipeline of diffusers, which hears text alone, is told a layout.

>>> say = PlacedPrompts.from_pretrained("mini")
>>> prompts = say(["two red stars"], seeds=[0])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self, cast

import torch

from generation.generator import find_generator, load_generator
from generation.model.layout import PlacedObject, scenes_layout
from generation.planner import PART, LayoutPlanner
from generation.text.encoders import TextEncoder
from layton.devices import choose_device
from layton.ldm.text import hears_places
from layton.scenes import Colour, Shape
from layton.scenes.placed import join_phrases, placed_phrase


@dataclass(frozen=True, slots=True, eq=False)
class PlacedPrompts:
    """Says prompts anew.

    Attributes:
        text_encoder: What the planner reads prompts with.
        planner: Of layouts of Scenes.

    Raises:
        ValueError: If the planner's labels are not shapes and colours of Scenes.
    """

    text_encoder: TextEncoder
    planner: LayoutPlanner

    def __post_init__(self) -> None:
        labels = self.planner.layout.labels
        if labels != scenes_layout().labels:
            told = ", ".join(str(kind[0]) for kind in labels)
            raise ValueError(f"places are said of shapes and colours of Scenes; the planner's labels begin with {told}")

    @classmethod
    def from_pretrained(cls, name: str | Path, *, allow: Sequence[str] = (), device: str | None = None) -> Self:
        """Take the planner out of a saved LaytonGen.

        Args:
            name: An embedded model such as ``"mini"``, or a folder that has one.
            allow: Prefixes of class names that may be loaded beside ``layton.`` and ``generation.``.
            device: Where to plan; the accelerator if there is one.

        Raises:
            ValueError: If there is no planner, or something is damaged.
        """
        generator = load_generator(find_generator(name), allow=allow)
        if generator.planner is None:
            raise ValueError(f"{name} has no planner")
        place = choose_device(device)
        return cls(generator.text_encoder.eval().to(place), generator.planner.eval().to(place))

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[str]:
        """One prompt for each prompt and seed, which depends on these two alone.

        A prompt of which the planner makes no objects, as of an empty one, stays as it is.

        Raises:
            ValueError: If there are not as many seeds as prompts.
        """
        if len(prompts) != len(seeds):
            raise ValueError(f"each prompt needs a seed, got {len(prompts)} and {len(seeds)}")
        if not prompts:
            return []
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        layouts = self.planner.draw(self.text_encoder.encode(prompts), generators)
        planned = [
            self.planner.layout.objects_of(layout) if prompt else None
            for prompt, layout in zip(prompts, layouts, strict=True)
        ]
        pairs = zip(prompts, planned, strict=True)
        return [say_objects(objects) if objects else prompt for prompt, objects in pairs]


def has_places(name: str | Path) -> bool:
    """Whether a model has both: a planner, and a text-to-image pipeline whose tokenizer knows places."""
    from layton.assets import find_pipeline

    try:
        pipeline, generator = find_pipeline(name), find_generator(name)
        return hears_places(pipeline) and (generator / PART).is_dir()
    except (OSError, ValueError):
        return False


def say_objects(objects: Sequence[PlacedObject]) -> str:
    """A layout of Scenes as a prompt: "red star <24> <h7>, blue ring <18> <c12>"."""
    return join_phrases(
        placed_phrase(cast(Shape, each.labels[0]), cast(Colour, each.labels[1]), each.x, each.y, each.diameter)
        for each in objects
    )
