"""Trains the arms of a claim: `layton fit` on the committed run files, one run folder for each stage, resumable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layton.distillation.distilled import student_pipeline
from layton.reproduce.claim import QUICK_OVERLAY, Arm, Context, Stage
from layton.reproduce.run_files import assign, batch_size_of, read_run, write_run
from layton.run.files import moved, set_scenes

SPENT_FILE = "spent.json"
RUN_FILE = "run.yaml"
TEACHER_PLACE = "runs/text_to_image/export"
_CALLBACK = "layton.reproduce.budget.BudgetStop"
_PICTURES = "layton.callbacks.PictureGrid"


class TrainingStoppedError(RuntimeError):
    """A signal ended a run after it was saved.

    Attributes:
        status: Exit status of the run, 128 + the signal's number.
    """

    def __init__(self, status: int) -> None:
        super().__init__(f"training was stopped by signal {status - 128}; the same command goes on where it was")
        self.status = status


def stage_folder(context: Context, arm: Arm, stage: Stage) -> Path:
    """The run folder of a stage."""
    return context.out / "arms" / arm.name / stage.name


def train_arm(
    arm: Arm,
    context: Context,
    places: Mapping[str, Path],
    *,
    image_size: int = 256,
    outputs: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Train what is not trained yet of an arm.

    Args:
        arm: With at least one stage.
        context: Of the measurement.
        places: Folders by the paths that stand for them in run files.
        image_size: Side in pixels at which scenes are rendered for training. Their captions say where objects stand if
            the teacher hears that.
        outputs: For stages that later ones start from: the path that stands for their export in run files.

    Returns:
        By stage what it spent (`layton.reproduce.budget.BudgetStop`).

    Raises:
        TrainingStoppedError: A signal ended a run.
        ValueError: A run file does not fit.
    """
    found = dict(places)
    for stage in arm.stages:
        if stage.teacher is not None:
            before = next(other for other in arm.stages if other.name == stage.teacher)
            export = stage_folder(context, arm, before) / "export"
            folder = student_pipeline(places[TEACHER_PLACE], export, context.out / "teachers" / arm.name)
            found[TEACHER_PLACE] = folder
        _train_stage(resolved_run(arm, stage, context, found, image_size=image_size), arm, stage, context)
        if outputs is not None and stage.name in outputs:
            found[outputs[stage.name]] = stage_folder(context, arm, stage) / "export"
    return spent_by(arm, context)


def spent_by(arm: Arm, context: Context) -> dict[str, Any]:
    """What each stage of a trained arm spent."""
    return {
        stage.name: json.loads((stage_folder(context, arm, stage) / SPENT_FILE).read_text(encoding="utf-8"))
        for stage in arm.stages
    }


def _train_stage(run: Mapping[str, Any], arm: Arm, stage: Stage, context: Context) -> None:
    folder = stage_folder(context, arm, stage)
    if (folder / SPENT_FILE).is_file() and (folder / "export").is_dir():
        context.say(f"{arm.name}, {stage.name}: trained already")
        return
    context.say(f"{arm.name}, {stage.name}: training")
    write_run(run, folder / RUN_FILE)
    from layton.run.training import run as fit

    status = fit("fit", ["--config", str(folder / RUN_FILE), "--run_dir", str(folder), "--resume", "auto"])
    if status:
        raise TrainingStoppedError(status)
    if not (folder / SPENT_FILE).is_file():
        raise ValueError(f"{folder}: the run ended before its budget was spent; look at its limits of time and epochs")


def resolved_run(
    arm: Arm, stage: Stage, context: Context, places: Mapping[str, Path], *, image_size: int
) -> dict[str, Any]:
    """The run file of a stage as it is trained; arguments as for `train_arm`.

    Raises:
        ValueError: The run file lacks a place for something that is to be set.
    """
    from layton.ldm.text import hears_places

    quick = None if context.scale.name == "full" else context.configs.parent / QUICK_OVERLAY
    # Caches are shared by all arms; pairs belong to the stage that pays for them.
    own = {"runs/cache": context.out / "cache", "runs/pairs": stage_folder(context, arm, stage) / "pairs"}
    change = None if stage.overlay is None else context.configs / stage.overlay
    run: dict[str, Any] = moved(read_run(context.configs / stage.config, change, quick), {**places, **own})
    run["trainer"].setdefault("devices", 1)  # more would be processes that run `layton reproduce` once more
    set_scenes(run, size=image_size, places=hears_places(places[TEACHER_PLACE]))
    budget = context.scale.budget * arm.budget * stage.share
    prepaid = 0.0
    if stage.pairs is not None:
        count = stage.pairs.count(budget)
        prepaid = count * stage.pairs.forwards
        assign(run, "data.init_args.train.0.init_args.num_pairs", count)
        assign(run, "data.init_args.train.0.init_args.prompts.init_args.length", count)
    if stage.scenes is not None:
        assign(run, stage.scenes, context.scale.train_scenes)
    for option, value in stage.changes:
        assign(run, option, value)
    for phase in stage.phases:
        assign(run, phase.option, phase.step(budget - prepaid, batch_size_of(run)))
    trainer = run.setdefault("trainer", {})
    trainer |= {"max_steps": -1, "max_epochs": -1}
    stop = {"class_path": _CALLBACK, "init_args": {"forwards": budget, "prepaid": prepaid}}
    others = trainer.get("callbacks", [])
    if context.scale.name != "full":
        others = [callback for callback in others if callback["class_path"] != _PICTURES]
    trainer["callbacks"] = [stop, *others]  # first: what others draw after a step is not counted
    return run


def claim_out(context: Context, *, claim: str, teacher: str) -> None:
    """Begin a measurement in ``context.out``, or make sure that the one begun there is this one.

    Args:
        context: Of the measurement.
        claim: Its name.
        teacher: Digest of the weights that everything starts from.

    Raises:
        ValueError: The folder holds another measurement.
    """
    files = [*sorted(context.configs.glob("*.yaml")), *sorted(context.configs.parent.glob("*.yaml"))]
    plan = {
        "claim": claim,
        "scale": json.loads(json.dumps(context.scale.to_dict())),
        "teacher": teacher,
        "options": json.loads(json.dumps(context.options, default=str)),
        "configs": {
            str(file.relative_to(context.configs.parent)): hashlib.sha256(file.read_bytes()).hexdigest()[:16]
            for file in files
        },
    }
    path = context.out / "plan.json"
    if path.is_file():
        stored = json.loads(path.read_text(encoding="utf-8"))
        changed = sorted(name for name in plan if stored.get(name) != plan[name])
        if changed:
            raise ValueError(
                f"{context.out} holds a measurement with another {', '.join(changed)}: take another --out, or remove it"
            )
        return
    from layton.folder import write_json

    write_json(path, plan)
