"""SCott against LCM in two steps (arXiv 2403.01505)."""

from __future__ import annotations

from layton.reproduce.claim import LATENT_SCENES, Arm, Claim, Context, Phase, Stage
from layton.reproduce.mlcm import LCM_PHASES, LR_END
from layton.reproduce.report import Check, Outcome
from layton.reproduce.students import Measured, measure_students

# F a sample, as counted: student, its averaged target, three moves of the guided teacher, and the discriminator
_PHASES = (Phase(LR_END, forwards=21.36),)

METHOD = Arm("scott", "method", (Stage("train", "scott.yaml", phases=_PHASES, scenes=LATENT_SCENES),), steps=(1, 2, 4))
BASELINE = Arm(
    "lcm", "baseline", (Stage("train", "../lcm.yaml", phases=LCM_PHASES, scenes=LATENT_SCENES),), steps=(1, 2, 4)
)


def judge(measured: Measured, context: Context) -> list[Check]:
    """The two floors."""
    ratio, spread = measured.fd_ratio(("scott", 2), ("lcm", 2))
    ours, theirs = measured.coverage("scott", 2), measured.coverage("lcm", 2)
    return [
        Check(
            "2 steps: FD-effnet over LCM's at equal budget",
            "COCO FID 21.9 against 30.4, x 0.72",
            f"{measured.fd('scott', 2):.2f} against {measured.fd('lcm', 2):.2f}",
            ratio,
            "at most",
            0.85,
            spread,
        ),
        Check(
            "2 steps: coverage above LCM's",
            "MJHQ 0.879 against 0.702, + 0.177",
            f"{ours:.3f} against {theirs:.3f} (ratio {ours / theirs:.2f})" if theirs else f"{ours:.3f} against 0",
            ours - theirs,
            "at least",
            0.5 / measured.evaluator.scale.images,  # higher, if only by one image: half a step of the measure
        ),
    ]


CLAIM = Claim(
    "scott",
    "SCott: two steps, closer to the data and more diverse than LCM",
    "arXiv 2403.01505",
    (METHOD, BASELINE),
    judge,
)


def measure(context: Context) -> Outcome:
    """Measure the claim."""
    return measure_students(CLAIM, context)
