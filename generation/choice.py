"""What a user asks of a model's sampling beside its own defaults."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from generation.generator import SamplingDefaults
    from generation.guidance import Guidance
    from generation.sampling import SamplingOptions

Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True, slots=True)
class SamplingChoice:
    """Settings of one call; None stands for the model's own.

    Attributes:
        guidance_scale: Of classifier-free guidance; 1 is none.
        guidance_schedule: How guidance grows over the codes, see `generation.guidance.Guidance`.
        guidance_start: First code that is guided.
        guidance_stop: First code that is not guided any more; None for never.
        temperature: 0 takes the likeliest code each time.
        top_k: Number of likeliest codes to draw among; 0 for all.
        top_p: Share of the likeliest codes to draw among; 1 for all.
        min_entropy: Nats from which on guidance and temperature act, see `generation.sampling.SamplingOptions`.
        candidates: Images drawn for each one that is wanted, of which a judge keeps the best.
        no_layout: Draw from the prompt alone, without the model's planner (`generation.planner`).
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
        from generation.guidance import Guidance

        own = asdict(defaults)
        asked: dict[str, Any] = {name: value for name, value in asdict(self).items() if value is not None}
        whole = type(defaults)(**{**own, **{name: asked[name] for name in own.keys() & asked.keys()}})
        guidance = Guidance(whole.guidance_scale, self.guidance_start, self.guidance_stop, self.guidance_schedule)
        return whole.options(), guidance

    def given(self) -> list[str]:
        """Names of the settings that only LaytonGen has and that were asked for."""
        plain = asdict(SamplingChoice(self.guidance_scale))
        return [name for name, value in asdict(self).items() if value != plain[name]]
