"""The two ways in which MLCM goes on after its first phase, as run files write them.

Rows of the ablation table of TLCM (arXiv 2406.05768, v6) as arguments of `distill.methods.mlcm.MLCM`, each on top of
the last:

===========================  ================================================================
row                          here
===========================  ================================================================
LCD, one segment             ``progression=Progression((1,), (0,)), states="noised"``
MLCD, M = 8                  ``states="noised"``
latent LPIPS                 ``features=LatentPerceptualDistance(net)``
multistep denoising          ``states="denoised"`` (the default; no images)
improved second stage        ``refinement=Refinement()``
preference (MPS)             ``extras=[PreferenceTerm(scorer)]``
distribution matching        ``extras=[..., DistributionMatching()]``
adversarial                  ``extras=[..., Adversarial()]``
MLCM v1 in place of stage 2  ``progression=Progression((8, 4, 2), (0, 6000, 9000))``
===========================  ================================================================
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from distill.methods.segments import GRID_SEGMENTS, INFERENCE_INDICES


@dataclass(frozen=True, slots=True)
class Progression:
    """How many segments at which step (MLCM v1; the exact steps are not published, 8 -> 4 -> 2 is inferred)."""

    segments: tuple[int, ...] = (8, 4, 2)
    starts: tuple[int, ...] = (0, 6000, 9000)  # first optimizer step of each phase

    def __post_init__(self) -> None:
        ordered = all(a < b for a, b in zip(self.starts, self.starts[1:], strict=False))
        if not self.segments or len(self.segments) != len(self.starts) or self.starts[0] != 0 or not ordered:
            raise ValueError(
                f"each phase needs a start, the first one 0 and the others increasing; got segments {self.segments} "
                f"and starts {self.starts}"
            )

    def at(self, step: int) -> int:
        """Number of segments at an optimizer step >= 0."""
        return self.segments[bisect_right(self.starts, step) - 1]


@dataclass(frozen=True, slots=True)
class Refinement:
    """TLCM's second stage (v6, Algorithm 2): consistency of x_0 along teacher moves that start at student samples."""

    start: int = 12_000  # first optimizer step of the stage
    student_steps: int = 4  # q
    teacher_steps: int = 3  # p
    num_segments: int = 8  # M; states lie on its milestones only

    def __post_init__(self) -> None:
        if self.start < 0 or self.teacher_steps < 1 or self.num_segments < 1:
            raise ValueError(f"start must be >= 0, teacher_steps and num_segments >= 1, got {self}")
        if self.student_steps not in INFERENCE_INDICES:
            raise ValueError(f"student_steps must lie in [1, {GRID_SEGMENTS}], got {self.student_steps}")
