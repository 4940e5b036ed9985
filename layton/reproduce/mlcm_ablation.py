"""The parts of MLCM and TLCM, each on top of the last (arXiv 2406.05768 v6, ablation in 4 steps)."""

from __future__ import annotations

from layton.reproduce.ablation import Setting, measure_table
from layton.reproduce.claim import Context, Phase
from layton.reproduce.report import Outcome

_REFINED = (Phase("model.init_args.method.init_args.refinement.start", forwards=15 / 0.8),)
_PERCEPTUAL = "runs/latent_perceptual/export"
_MATCHER = "runs/matcher/export"

SETTINGS = (
    Setting("lcd", "consistency over the whole range (LCD)", "CLIP score 31.61, FID 32.90"),
    Setting("mlcd", "8 segments (MLCD)", "31.76, 27.01"),
    Setting(
        "perceptual",
        "8 segments, distance in a latent perceptual network",
        "31.99, 27.61",
        needs=_PERCEPTUAL,
        made_by="configs/mini/latent_perceptual.yaml",
    ),
    Setting("denoised", "8 segments, states by multistep denoising: no images", "32.31, 30.99"),
    Setting(
        "progressive",
        "the same, then 4 and 2 segments (version 1)",
        phases=(
            Phase("model.init_args.method.init_args.progression.starts.1", forwards=15 / 0.6),
            Phase("model.init_args.method.init_args.progression.starts.2", forwards=15 / 0.8),
        ),
    ),
    Setting("refined", "the same, then the improved second stage", "33.06, 25.44", phases=_REFINED),
    Setting(
        "preference",
        "and preference learning",
        "33.16, 28.40",
        phases=_REFINED,
        needs=_MATCHER,
        made_by="configs/mini/matcher.yaml",
    ),
    Setting("matching", "second stage and distribution matching", "33.32, 30.58 (with preference)", phases=_REFINED),
    Setting("adversarial", "and an adversarial term", "33.52, 30.33 (with preference)", phases=_REFINED),
)


def measure(context: Context) -> Outcome:
    """Measure the table."""
    title, source = "MLCM part by part, 4 steps", "arXiv 2406.05768 v6, ablation table"
    return measure_table("mlcm_ablation", title, source, SETTINGS, context, steps=4)
