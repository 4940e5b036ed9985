"""The parts of MLCM and TLCM, one row each (arXiv 2406.05768 v6, ablation in 4 steps).

The paper's rows add up, and hold the latent perceptual distance from its row on; here a row names what it has, so that
those which need a further trained network can be left out.
"""

from __future__ import annotations

from layton.reproduce.ablation import Setting, measure_table
from layton.reproduce.claim import Context, Phase
from layton.reproduce.report import Outcome

_METHOD = "model.init_args.method.init_args"
_END = "model.init_args.lr_scheduler.init_args.T_max"
# Forward-equivalents of a sample: student 3, its target 1, teacher 2 with guidance; where states come by denoising, the
# teacher has 9 more to do on average.
_NOISED, _DENOISED = 6.0, 15.0


def _whole(forwards: float) -> tuple[Phase, ...]:
    """The learning rate falls to 0 over all steps, of one kind."""
    return (Phase(_END, forwards=forwards),)


def _refined(forwards: float, extras: int = 0) -> tuple[Phase, ...]:
    """The second stage and the terms that begin with it take the last fifth of the budget, at so much a sample."""
    starts = (f"{_METHOD}.refinement.start", *(f"{_METHOD}.extras.{i}.init_args.start" for i in range(extras)))
    ends = Phase(_END, forwards=1 / (0.8 / _DENOISED + 0.2 / forwards))
    return (ends, *(Phase(option, forwards=_DENOISED / 0.8) for option in starts))


_PERCEPTUAL = "runs/latent_perceptual/export"
_MATCHER = "runs/matcher/export"

_WITH = "with the perceptual distance"
_BEFORE = "with all before it"
_DATA = "--data configs/data/scenes_latents.yaml"

SETTINGS = (
    Setting("lcd", "consistency over the whole range (LCD)", "CLIP score 31.61, FID 32.90", _whole(_NOISED)),
    Setting("mlcd", "8 segments (MLCD)", "31.76, 27.01", _whole(_NOISED)),
    Setting(
        "perceptual",
        "8 segments, distance in a latent perceptual network",
        "31.99, 27.61",
        _whole(_NOISED),
        needs=_PERCEPTUAL,
        made_by=f"configs/mini/latent_perceptual.yaml {_DATA}",
    ),
    Setting(
        "denoised",
        "8 segments, states by multistep denoising: no images",
        f"32.31, 30.99, {_WITH}",
        _whole(_DENOISED),
    ),
    Setting(
        "progressive",
        "8 segments without images, then 4 and 2 (version 1)",
        phases=(
            Phase(_END, forwards=1 / (0.6 / _DENOISED + 0.2 / 11 + 0.2 / 9)),
            Phase(f"{_METHOD}.progression.starts.1", forwards=_DENOISED / 0.6),
            Phase(f"{_METHOD}.progression.starts.2", forwards=1 / (0.6 / _DENOISED + 0.2 / 11)),
        ),
    ),
    Setting("refined", "second stage after 8 segments without images", f"33.06, 25.44, {_WITH}", _refined(14.0)),
    Setting(
        "preference",
        "second stage with preference learning",
        f"33.16, 28.40, {_WITH}",
        _refined(14.0, 1),
        needs=_MATCHER,
        made_by=f"configs/mini/matcher.yaml {_DATA}",
    ),
    Setting("matching", "second stage with distribution matching", f"33.32, 30.58, {_BEFORE}", _refined(18.0, 1)),
    Setting(
        "adversarial",
        "second stage with distribution matching and an adversarial term",
        f"33.52, 30.33, {_BEFORE}",
        _refined(27.0, 2),
    ),
)


def measure(context: Context) -> Outcome:
    """Measure the table."""
    title, source = "MLCM part by part, 4 steps", "arXiv 2406.05768 v6, ablation table"
    return measure_table("mlcm_ablation", title, source, SETTINGS, context, steps=4)
