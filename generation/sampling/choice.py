"""What a user asks of a model's sampling beside its own defaults."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from layton.errors import UsageError

if TYPE_CHECKING:
    from generation.generator import SamplingDefaults
    from generation.sampling.codes import SamplingOptions
    from generation.sampling.guidance import Guidance

Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True, slots=True)
class SamplingChoice:
    """How a model is sampled; by default as it says itself. A diffusion model knows a guidance scale only.

    Attributes:
        guidance_scale: of classifier-free guidance; 1 is none; LaytonGen's own, or 3 for a diffusion model by default.
        guidance_schedule: constant, or how guidance grows from 1 over the codes: linear, or cosine.
        guidance_start: first code that is guided.
        guidance_stop: first code that is not guided any more; by default all others are.
        temperature: 0 takes the likeliest code each time.
        top_k: number of likeliest codes to draw among; 0 for all.
        top_p: share of the likeliest codes to draw among; 1 for all.
        min_entropy: where LaytonGen is surer of the next code than so many nats, that is drawn plainly; 0 for nowhere.
        candidates: images drawn for each one that is kept: the one that the judge beside the tokenizer likes best.
        no_layout: draw from prompts alone, without the planner that LaytonGen may have.
    """

    guidance_scale: float | None = None
    guidance_schedule: Schedule = "constant"
    guidance_start: int = 0
    guidance_stop: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_entropy: float | None = None
    candidates: int | None = None
    no_layout: bool = False

    def over(self, defaults: SamplingDefaults) -> tuple[SamplingOptions, Guidance]:
        """These settings, filled up with a model's defaults.

        Raises:
            ValueError: If a value is out of range.
        """
        from generation.sampling.guidance import Guidance

        own = asdict(defaults)
        asked: dict[str, Any] = {name: value for name, value in asdict(self).items() if value is not None}
        whole = type(defaults)(**{**own, **{name: asked[name] for name in own.keys() & asked.keys()}})
        guidance = Guidance(whole.guidance_scale, self.guidance_start, self.guidance_stop, self.guidance_schedule)
        return whole.options(), guidance

    def given(self) -> list[str]:
        """Names of the settings that only LaytonGen has and that were asked for."""
        plain = asdict(SamplingChoice(self.guidance_scale))
        return [name for name, value in asdict(self).items() if value != plain[name]]


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
