"""InstaFlow against direct and progressive distillation in one step (arXiv 2309.06380)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from layton.distillation.distilled import student_pipeline
from layton.reproduce.claim import LATENT_SCENES, Arm, Claim, Context, Pairs, Phase, Scale, Stage
from layton.reproduce.report import Check, Outcome
from layton.reproduce.students import Measured, measure_students
from layton.reproduce.training import TEACHER_PLACE, stage_folder, train_arm

_GUIDED_PAIR, _STRAIGHT_PAIR = 20.0, 6.0  # 10 guided steps of the teacher; 6 plain ones of the rectified flow
_METHOD = "model.init_args.method.init_args"
_LR_END = "model.init_args.lr_scheduler.init_args.T_max"  # the learning rate falls to 0 over all steps
_PERCEPTUAL_SAMPLE = 5.5  # decoding a square and the perceptual network, forwards and back, cost 2.5 F
_REFLOW_PHASES = (Phase(_LR_END, forwards=3.0),)
_ONE_STEP_PHASES = (
    Phase(f"{_METHOD}.perceptual_start", forwards=3 / 0.6),  # 3 F a sample; 60 % of training by L2 alone
    Phase(_LR_END, forwards=1 / (0.6 / 3 + 0.4 / _PERCEPTUAL_SAMPLE)),
)
# Phases of equal length, the last one twice as long: 7 F a sample under guidance in the first, then 5 F. The learning
# rate falls to 0 within each phase, as in the paper (arXiv 2202.00512, section 5); a little longer than the budget, so
# that the last step does not begin another one.
_ALL_PHASES = 0.98 * (7 + 3 * 5 + 2 * 5)
PROGRESSIVE_PHASES = (
    Phase(f"{_METHOD}.steps_per_phase", forwards=_ALL_PHASES),
    Phase("model.init_args.lr_scheduler.init_args.T_0", forwards=_ALL_PHASES),
)

REFLOW = Stage("reflow", "reflow.yaml", share=0.5, pairs=Pairs(0.4, _GUIDED_PAIR), phases=_REFLOW_PHASES)
ONE_STEP = Stage(
    "one_step",
    "one_step.yaml",
    share=0.5,
    teacher="reflow",
    pairs=Pairs(0.25, _STRAIGHT_PAIR),
    phases=_ONE_STEP_PHASES,
)
METHOD = Arm("instaflow", "method", (REFLOW, ONE_STEP), steps=(1,))
DIRECT = Arm(
    "direct",
    "baseline",
    (Stage("train", "direct.yaml", pairs=Pairs(0.4, _GUIDED_PAIR), phases=_ONE_STEP_PHASES),),
    steps=(1,),
)
PROGRESSIVE = Arm(
    "progressive",
    "baseline",
    (Stage("train", "../progressive.yaml", phases=PROGRESSIVE_PHASES, scenes=LATENT_SCENES),),
    steps=(1,),
)

STRAIGHT_FORWARDS = 4.5e5
"""What a flow is given whose straightness is measured: the claim on it has no budget, and S falls for long."""


def reflow_alone(scale: Scale) -> Arm | None:
    """The arm whose flow is measured for straightness; None at the quick scale, or where the method has as much."""
    share = STRAIGHT_FORWARDS / scale.budget
    if scale.name == "quick" or share <= REFLOW.share:
        return None
    return Arm("reflow_alone", "reference", (replace(REFLOW, share=1.0),), budget=share)


def judge(measured: Measured, context: Context) -> list[Check]:
    """Straightness, then the one-step figures against both baselines."""
    straight = _straightness(measured, context)
    teacher = min(straight["teacher"], straight["teacher_guided"])
    flow = straight.get("reflow_alone", straight["reflow"])
    alone = straight.get("reflow_alone_forwards")
    spent = "" if alone is None else f" after {alone:,.0f} forward-equivalents"
    checks = [
        Check(
            "straightness S of the 2-rectified flow over the teacher's",
            "lower (figure 6)",
            f"{flow:.4f}{spent} against {straight['teacher']:.4f} (guided {straight['teacher_guided']:.4f}; flow of "
            f"the one-step student {straight['reflow']:.4f})",
            flow / max(teacher, 1e-12),
            "at most",
            0.5,
        )
    ]
    for baseline, paper in (
        ("direct", "FID 31.0 against 40.9, x 0.76"),
        ("progressive", "FID 23.4 against 37.2, x 0.63"),
    ):
        ratio, spread = measured.fd_ratio(("instaflow", 1), (baseline, 1))
        figures = f"{measured.fd('instaflow', 1):.2f} against {measured.fd(baseline, 1):.2f}"
        checks.append(
            Check(f"1 step: FD-effnet over {baseline} distillation's", paper, figures, ratio, "at most", 0.8, spread)
        )
    ours = measured.scenes("instaflow", 1)
    best = max(measured.scenes("direct", 1), measured.scenes("progressive", 1), key=lambda scores: scores.mean)
    checks.append(
        Check(
            "1 step: SceneEval points above the better baseline",
            "",
            f"{100 * ours.mean:.1f} against {100 * best.mean:.1f}",
            100 * (ours.mean - best.mean),
            "at least",
            1e-6,  # higher
            100 * (ours.standard_error**2 + best.standard_error**2) ** 0.5,
        )
    )
    return checks


def _straightness(measured: Measured, context: Context) -> dict[str, float]:
    """S of the teacher, plain and under the guidance that its pairs were made with, and of reflowed models."""
    path = context.out / "evaluation" / "straightness.json"
    if not path.is_file():
        from layton.folder import write_json

        reflowed = context.out / "teachers" / METHOD.name
        guidance = _pairs_guidance(context.configs / REFLOW.config)
        count = max(4, min(256, context.scale.images // 4))
        figures = {
            "teacher": straightness_of(measured.teacher, count),
            "teacher_guided": straightness_of(measured.teacher, count, guidance_scale=guidance),
            "guidance": guidance,
            "reflow": straightness_of(reflowed, count),
            "samples": count,
        }
        arm = reflow_alone(context.scale)
        if arm is not None:
            spent = train_arm(arm, context, {TEACHER_PLACE: measured.teacher}, image_size=measured.evaluator.image_size)
            export = stage_folder(context, arm, arm.stages[0]) / "export"
            folder = student_pipeline(measured.teacher, export, context.out / "teachers" / arm.name)
            figures |= {"reflow_alone": straightness_of(folder, count)}
            figures |= {"reflow_alone_forwards": float(spent[REFLOW.name]["forwards"])}
        write_json(path, figures)
    found: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _pairs_guidance(run_file: Path) -> float:
    """The guidance that a run file's pairs are made with."""
    run: dict[str, Any] = yaml.safe_load(run_file.read_text(encoding="utf-8"))
    return float(run["model"]["init_args"]["method"]["init_args"]["solver"]["guidance_scale"])


def straightness_of(pipeline: Path, count: int, *, guidance_scale: float = 1.0, batch_size: int = 16) -> float:
    """S(Z) of a pipeline's model along 25 Euler steps, over captions of test Scenes and fixed noise.

    Trajectories begin where the teacher's schedule does, so that nothing is extrapolated.

    Args:
        pipeline: Folder.
        count: Samples.
        guidance_scale: Of the field that is measured.
        batch_size: Samples at once.
    """
    import torch

    from distill.methods.pairs import guided
    from distill.models import denoiser_from_pipeline
    from distill.straightness import straightness
    from layton.data.prompts import SceneCaptions
    from layton.distillation.pairs import noise_of
    from layton.ldm.conditions import PromptEncoder, latent_shape_of
    from layton.ldm.teacher import open_pipeline
    from layton.ldm.text import hears_places

    pipe = open_pipeline(pipeline)
    shape = latent_shape_of(pipe)
    encoder, denoiser = PromptEncoder(pipe, latent_size=shape[1:]), denoiser_from_pipeline(pipe).eval()
    network = guided(denoiser, guidance_scale, encoder.null() if guidance_scale > 1 else None)
    noisiest = denoiser.schedule.coefficients(torch.tensor([denoiser.schedule.terminal_t], dtype=torch.float64))
    start = float(noisiest.alpha / (noisiest.alpha + noisiest.sigma))
    captions = SceneCaptions(split="test", length=count, places=float(hears_places(pipeline)))
    found = []
    for first in range(0, count, batch_size):
        numbers = range(first, min(first + batch_size, count))
        condition = encoder([str(captions.sample(number, seed=0)["caption"]) for number in numbers])
        found.append(straightness(network, noise_of(list(numbers), shape), condition, start_s=start).per_sample)
    return float(torch.cat(found).mean())


CLAIM = Claim(
    "instaflow",
    "InstaFlow: reflow makes one-step distillation work",
    "arXiv 2309.06380",
    (METHOD, DIRECT, PROGRESSIVE),
    judge,
)


def measure(context: Context) -> Outcome:
    """Measure the claim."""
    return measure_students(CLAIM, context)
