"""Classifier-free guidance: how strong, and for which codes.

``l = l_none + s (l_condition - l_none)`` on logits at every code (LlamaGen, arXiv 2406.06525, section 2.3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from generation.sampling.choice import Schedule


@dataclass(frozen=True, slots=True)
class Guidance:
    """Strength of guidance for code i of N.

    Attributes:
        scale: s; 1 is no guidance, and then nothing is computed for it.
        start: First code that is guided.
        stop: First code that is not guided any more; None for never. Codes outside have scale 1.
        schedule: How the scale goes from 1 to ``scale`` over the guided codes: at once, linearly, or as half a cosine.
    """

    scale: float = 1.0
    start: int = 0
    stop: int | None = None
    schedule: Schedule = "constant"

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: If a value is out of range.
        """
        if not (math.isfinite(self.scale) and self.scale >= 0.0):
            raise ValueError(f"guidance scale must be finite and at least 0, got {self.scale}")
        if self.start < 0 or (self.stop is not None and self.stop < self.start):
            raise ValueError(f"the guided codes must be a range, got {self.start} to {self.stop}")
        if self.schedule not in ("constant", "linear", "cosine"):
            raise ValueError(f"schedule must be constant, linear or cosine, got {self.schedule!r}")

    def at(self, index: int, num_tokens: int) -> float:
        """Scale for code ``index`` of ``num_tokens``."""
        stop = num_tokens if self.stop is None else min(self.stop, num_tokens)
        if not self.start <= index < stop:
            return 1.0
        share = (index - self.start + 1) / (stop - self.start)
        if self.schedule == "linear":
            return 1.0 + (self.scale - 1.0) * share
        if self.schedule == "cosine":
            return 1.0 + (self.scale - 1.0) * 0.5 * (1.0 - math.cos(math.pi * share))
        return self.scale

    def last(self, num_tokens: int) -> int:
        """Last code with a scale other than 1; -1 if there is none."""
        return max((index for index in range(num_tokens) if self.at(index, num_tokens) != 1.0), default=-1)


def guide(logits: Tensor, scale: float) -> Tensor:
    """Combine logits (2 B, V), conditional ones first, to (B, V)."""
    conditional, unconditional = logits.chunk(2)
    if scale == 1.0:
        return conditional
    return unconditional + scale * (conditional - unconditional)
