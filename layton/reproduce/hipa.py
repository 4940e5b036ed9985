"""HiPA against progressive distillation in one step (arXiv 2311.18158)."""

from __future__ import annotations

from layton.ldm.drawing import DEFAULT_GUIDANCE, DEFAULT_STEPS
from layton.reproduce.claim import Arm, Claim, Context, Pairs, Stage
from layton.reproduce.instaflow import PROGRESSIVE
from layton.reproduce.report import Check, Outcome
from layton.reproduce.students import Measured, drawer_of, measure_students, place_of

_GUIDED_PAIR = 20.0  # 10 guided steps
_SPECTRUM_IMAGES = 512

METHOD = Arm(
    "hipa",
    "method",
    (Stage("train", "hipa.yaml", pairs=Pairs(0.5, _GUIDED_PAIR)),),
    steps=(1,),
    budget=0.095,  # the last step goes over the budget: still ten times less
)
_ADAPTER = "model.init_args.adapter"
RANK_16 = Arm(  # the paper's rank, here 4 % of the parameters: reported beside the method
    "hipa_rank_16",
    "reference",
    (
        Stage(
            "train",
            "hipa.yaml",
            pairs=Pairs(0.5, _GUIDED_PAIR),
            changes=((f"{_ADAPTER}.rank", 16), (f"{_ADAPTER}.alpha", 16.0)),
        ),
    ),
    steps=(1,),
    budget=METHOD.budget,
)
UNADAPTED = Arm("unadapted", "reference", steps=(1,), measures=("fd",), one_step=True)
UNADAPTED_GUIDED = Arm(
    "unadapted_guided", "reference", steps=(1,), measures=("fd",), guidance=DEFAULT_GUIDANCE, one_step=True
)
TEACHER = Arm("teacher", "reference", steps=(DEFAULT_STEPS,), measures=(), guidance=DEFAULT_GUIDANCE)


def judge(measured: Measured, context: Context) -> list[Check]:
    """Quality, cost, size, and what is restored."""
    ratio, spread = measured.fd_ratio(("hipa", 1), ("progressive", 1))
    plain = min(("unadapted", "unadapted_guided"), key=lambda name: measured.fd(name, 1))
    gain, gain_spread = measured.fd_ratio(("hipa", 1), (plain, 1))
    compute = measured.forwards("progressive") / measured.forwards("hipa")
    # Progressive distillation trains the whole network anew in every phase; the paper counts so: 9 x 860M.
    trained, whole = measured.trained_parameters("hipa"), measured.trained_parameters("progressive")
    found = _spectra(measured, context)
    return [
        Check(
            "1 step: FD-effnet over progressive distillation's",
            "FID 23.8 against 37.3, x 0.64",
            f"{measured.fd('hipa', 1):.2f} against {measured.fd('progressive', 1):.2f}",
            ratio,
            "at most",
            0.8,
            spread,
        ),
        Check(
            "training compute of progressive distillation over HiPA's",
            "28.6 x",
            f"{measured.forwards('progressive'):,.0f} against {measured.forwards('hipa'):,.0f} forward-equivalents",
            compute,
            "at least",
            10.0,
        ),
        Check(
            "share of progressive distillation's trained parameters (one network)",
            "0.04 % (of nine networks)",
            f"{trained:,} against {whole:,}",
            trained / whole,
            "at most",
            0.01,
        ),
        Check(
            f"1 step: FD-effnet over the unadapted model's ({plain})",
            "",
            f"{measured.fd('hipa', 1):.2f} against {measured.fd(plain, 1):.2f}",
            gain,
            "at most",
            0.5,
            gain_spread,
        ),
        Check(
            "power in the top half of the radial spectrum: distance of its ratio to the teacher's from 1",
            "",
            f"{found:.3f} of the teacher's",
            abs(found - 1.0),
            "at most",
            0.2,
        ),
    ]


def _spectra(measured: Measured, context: Context) -> float:
    """Upper-half power of HiPA's pictures over that of the teacher's, of the same captions and seeds.

    The whole study, with the unadapted model's one step, is written to ``frequency_study/``.
    """
    from layton.distillation.frequency_study import study_frequencies, write_study

    count = min(_SPECTRUM_IMAGES, context.scale.images)
    pictures = {}
    for arm in (METHOD, UNADAPTED_GUIDED, TEACHER):
        draw = drawer_of(arm, arm.steps[0], context, measured.teacher)
        pictures[arm.name] = measured.evaluator.pictures(place_of(arm.name, arm.steps[0]), draw, count)
    many, one = pictures[TEACHER.name], pictures[UNADAPTED_GUIDED.name]
    study = study_frequencies(many, one, others={METHOD.name: pictures[METHOD.name]})
    write_study(study, context.out / "frequency_study", many_steps=many, one_step=one)
    return study.upper_half_ratio[METHOD.name]


CLAIM = Claim(
    "hipa",
    "HiPA: one-step low-rank adaptors against progressive distillation",
    "arXiv 2311.18158",
    (METHOD, PROGRESSIVE, RANK_16, UNADAPTED, UNADAPTED_GUIDED, TEACHER),
    judge,
)


def measure(context: Context) -> Outcome:
    """Measure the claim."""
    return measure_students(CLAIM, context)
