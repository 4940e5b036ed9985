"""MLCM against LCM: one student for 2 to 8 steps (arXiv 2406.05768)."""

from __future__ import annotations

from statistics import mean, stdev

from layton.reproduce.claim import LATENT_SCENES, Arm, Claim, Context, Phase, Stage
from layton.reproduce.report import Check, Outcome
from layton.reproduce.students import Measured, measure_students, teacher_arm

LR_END = "model.init_args.lr_scheduler.init_args.T_max"
LCM_PHASES = (Phase(LR_END, forwards=6.0),)  # F a sample: student 3, target 1, guided teacher 2
# 15 F a sample with 8 segments, for 80 % of the budget; then 11 F with 4. The learning rate falls to 0 over all steps.
_PHASES = (
    Phase("model.init_args.method.init_args.progression.starts.1", forwards=15 / 0.8),
    Phase(LR_END, forwards=1 / (0.8 / 15 + 0.2 / 11)),
)

METHOD = Arm("mlcm", "method", (Stage("train", "mlcm.yaml", phases=_PHASES),), steps=(2, 4, 8))
BASELINE = Arm("lcm", "baseline", (Stage("train", "../lcm.yaml", phases=LCM_PHASES, scenes=LATENT_SCENES),), steps=(4,))


def judge(measured: Measured, context: Context) -> list[Check]:
    """The three floors."""
    method, baseline = measured.scenes("mlcm", 4), measured.scenes("lcm", 4)
    points = [100 * (a - b) for a, b in zip(method.overall, baseline.overall, strict=True)]
    two, eight = measured.scenes("mlcm", 2), measured.scenes("mlcm", 8)
    growth = [100 * (a - b) for a, b in zip(eight.overall, two.overall, strict=True)]
    ratio, spread = measured.fd_ratio(("mlcm", 4), ("lcm", 4))
    return [
        Check(
            "4 steps: SceneEval points above LCM at equal budget",
            "CLIP score 33.52 against 32.53, + 0.99 (TLCM v6, table 1)",
            f"{100 * method.mean:.1f} against {100 * baseline.mean:.1f} (ratio {_ratio(method.mean, baseline.mean)})",
            mean(points),
            "at least",
            3.0,
            _error(points),
        ),
        Check(
            "8 steps not below 2 steps: points above, plus the standard error",
            "CLIP score 33.53 in 8 steps, 33.18 in 2",
            f"{100 * eight.mean:.1f} against {100 * two.mean:.1f} (ratio {_ratio(eight.mean, two.mean)})",
            mean(growth) + _error(growth),
            "at least",
            0.0,
            _error(growth),
        ),
        Check(
            "4 steps: FD-effnet over LCM's",
            "FID 30.33 against 27.09, x 1.12",
            f"{measured.fd('mlcm', 4):.2f} against {measured.fd('lcm', 4):.2f}",
            ratio,
            "at most",
            1.15,
            spread,
        ),
    ]


def _error(values: list[float]) -> float:
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def _ratio(above: float, below: float) -> str:
    return f"{above / below:.2f}" if below > 0 else "not defined"


CLAIM = Claim(
    "mlcm",
    "MLCM: one student for 2 to 8 steps, better than LCM in 4",
    "arXiv 2406.05768",
    (METHOD, BASELINE, teacher_arm()),
    judge,
)


def measure(context: Context) -> Outcome:
    """Measure the claim."""
    return measure_students(CLAIM, context)
