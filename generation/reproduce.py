"""LaytonGen's claim: it draws what it is told better than the small diffusion model (arXiv 2503.08377).

The paper's figures are GenEval's, ours SceneEval's: another scale, so only the order and our own floors are compared.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from generation.drawers import Drawer, DrawerOptions, load_drawer
from generation.generator import find_generator, find_tokenizer
from generation.sampling.choice import SamplingChoice
from layton.ldm.drawing import DEFAULT_GUIDANCE, DEFAULT_STEPS
from layton.ldm.text import hears_places
from layton.loading import default_decoder
from layton.reproduce.claim import Context
from layton.reproduce.evaluation import Evaluator, SceneScores
from layton.reproduce.report import Check, Outcome
from layton.reproduce.students import find_teacher
from layton.reproduce.training import claim_out

MOST_DECODER_STEPS = 3
_ONE, _UNPLANNED = "laytongen_one_candidate", "laytongen_without_planner"
_NO_PLANNER = "none: LaytonGen draws from the prompt alone"
_PLANNER = "LaytonGen is told where objects stand by its own planner, which reads the prompt alone"
_BOTH = "the diffusion model's prompts are said anew by the same planner"
_SIZE = 256  # not used: SceneEval looks at images of any size


def measure(context: Context) -> Outcome:
    """Score the embedded LaytonGen, and the small text-to-image model in 25 steps, on the same prompts and seeds.

    Raises:
        ValueError: One of the two is not there, or ``context.out`` holds another measurement.
    """
    teacher = find_teacher(context.pipeline)
    try:
        find_generator(context.tokenizer)
    except ValueError as error:
        raise ValueError(
            f"this claim needs a LaytonGen ({error}); give a folder that holds one with --tokenizer"
        ) from error
    ours = _laytongen(context, SamplingChoice())
    planned = ours.settings.get("planner") is not None
    told = planned and hears_places(teacher)  # then the diffusion model learns from it where objects stand, too
    planner = context.tokenizer if told else None
    sampling = SamplingChoice(DEFAULT_GUIDANCE)
    baseline = load_drawer(DrawerOptions(str(teacher), "diffusion", steps=DEFAULT_STEPS, planner=planner), sampling)
    drawers = {"laytongen": ours, "diffusion": baseline}
    candidates = int(drawers["laytongen"].settings["candidates"])
    if candidates > 1:
        drawers[_ONE] = _laytongen(context, SamplingChoice(candidates=1))
    if planned:
        drawers[_UNPLANNED] = _laytongen(context, SamplingChoice(no_layout=True))
    facts = json.dumps({name: drawer.settings for name, drawer in drawers.items()}, sort_keys=True)
    claim_out(context, claim="laytongen", teacher=hashlib.sha256(facts.encode()).hexdigest()[:16])
    evaluator = Evaluator(context.out / "evaluation", context.scale, _SIZE)
    scores: dict[str, SceneScores] = {}
    for name, drawer in drawers.items():
        context.say(f"{name}: SceneEval")
        scores[name] = evaluator.scene_scores(name, drawer.draw)
    return Outcome(
        claim="laytongen",
        title="LaytonGen: tokens from text follow the prompt better than the diffusion model they are decoded with",
        source="arXiv 2503.08377, GenEval",
        checks=tuple(judge(scores["laytongen"], scores["diffusion"])),
        arms={
            name: {"role": "baseline" if name == "diffusion" else "method", **drawer.settings}
            for name, drawer in drawers.items()
        },
        figures={name: found.to_dict() for name, found in scores.items()},
        protocol={
            "sceneval": "test prompts; mean and standard error over repetitions with other drawing seeds",
            "candidates": f"of LaytonGen {candidates}, of which its judge chooses one where there are several; of the "
            "diffusion model 1",
            "planner": _NO_PLANNER if not planned else _PLANNER if planner is None else f"{_PLANNER}; {_BOTH}",
            "scale": "SceneEval is another scale than GenEval: the paper's figures and ours are not to be compared",
        },
    )


def judge(ours: SceneScores, baseline: SceneScores) -> list[Check]:
    """The three floors."""
    worst = min(ours.tasks, key=lambda task: ours.tasks[task])
    error = (ours.standard_error**2 + baseline.standard_error**2) ** 0.5
    return [
        Check(
            "SceneEval, overall (another scale than GenEval)",
            "GenEval 0.73",
            f"{ours.mean:.3f}",
            ours.mean,
            "at least",
            0.75,
            ours.standard_error,
        ),
        Check(
            "SceneEval, the worst task", "", f"{ours.tasks[worst]:.3f} ({worst})", ours.tasks[worst], "at least", 0.5
        ),
        Check(
            f"SceneEval above the diffusion model's in {DEFAULT_STEPS} steps",
            "GenEval 0.73 against SDXL's 0.55",
            f"{ours.mean:.3f} against {baseline.mean:.3f}",
            ours.mean - baseline.mean,
            "at least",
            1e-9,  # higher
            error,
        ),
    ]


def _laytongen(context: Context, sampling: SamplingChoice) -> Drawer:
    """LaytonGen with its tokenizer's own decoder, in as many steps as that takes, but at most three."""
    name = context.tokenizer
    beside = str(find_tokenizer(name, find_generator(name)))
    drawer = load_drawer(DrawerOptions(name, tokenizer=beside, decoder=default_decoder(beside)), sampling)
    steps: Any = drawer.settings["num_inference_steps"]
    if int(steps) <= MOST_DECODER_STEPS:
        return drawer
    raise ValueError(
        f"the default decoder {drawer.settings['decoder']!r} takes {steps} steps, and this claim allows "
        f"{MOST_DECODER_STEPS}: the tokenizer lacks a consistency decoder"
    )
