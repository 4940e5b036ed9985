"""Options that commands share: which text-to-image model draws, and checks of its sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from generation.choice import SamplingChoice
from generation.weight_types import Weights as Weights  # for the commands
from layton.commands.options import require_least as require_least  # passed on
from layton.commands.options import require_shares as require_shares
from layton.errors import UsageError

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


def require_sampling(choice: SamplingChoice) -> None:
    """Stop unless these can be settings of LaytonGen.

    Raises:
        UsageError: With what is out of range.
    """
    from generation.generator import SamplingDefaults

    try:
        choice.over(SamplingDefaults())
    except ValueError as error:
        raise UsageError(str(error)) from error
