"""``layton evaluate sceneval`` for LaytonGen and for diffusion models."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from generation.drawers import DrawerOptions, load_drawer
from generation.sampling.choice import SamplingChoice
from layton.errors import UsageError
from layton.folder import write_json
from layton.options import refuse_given, require_least
from layton.progress import progress

if TYPE_CHECKING:
    from layton.sceneval import SceneEvalReport

_PER_TASK = 50
_DRAWER, _SAMPLING = DrawerOptions(), SamplingChoice()


def evaluate_sceneval(
    *,
    drawer: DrawerOptions = _DRAWER,
    sampling: SamplingChoice = _SAMPLING,
    prompts: Path | None = None,
    per_task: int | None = None,
    images_per_prompt: int = 4,
    seed: int = 0,
    batch_size: int = 16,
    out: Path | None = None,
    json: Path | None = None,
) -> None:
    """Score a text-to-image model on the Scenes prompts, in GenEval's form and on a scale of its own.

    Args:
        drawer: which model draws.
        sampling: how.
        prompts: file of prompts in GenEval's JSON lines; by default they are made from test seeds.
        per_task: prompts made for each of the six tasks, 50 by default; a fifth of unseen combinations where there are
            such.
        images_per_prompt: images drawn for each prompt.
        seed: of the first image; the following images count up from it.
        batch_size: images drawn at once, each with its candidates; the score does not depend on it.
        out: folder for the images in GenEval's layout; must be new or empty.
        json: write scores and protocol to this file as well.
    """
    require_least(1, {"per_task": per_task, "images_per_prompt": images_per_prompt, "batch_size": batch_size})
    require_least(0, {"seed": seed})
    from layton.metrics.protocol import library_versions
    from layton.quiet import cut_captions_told_once
    from layton.ranks import num_ranks, own_rank
    from layton.sceneval import make_prompts, read_prompts, run_sceneval

    out = out if own_rank() == 0 else None
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is not empty: images of another run there would be counted as this one's")
    if prompts is not None:
        refuse_given({"per_task": per_task}, "of prompts that are made, and --prompts names a file of them")
    specs = make_prompts(per_task or _PER_TASK) if prompts is None else read_prompts(prompts)
    loaded = load_drawer(drawer, sampling)
    with progress(len(specs) * images_per_prompt, "draw") as bar, cut_captions_told_once():
        report = run_sceneval(
            loaded.draw,
            specs,
            images_per_prompt,
            out,
            batch_size=batch_size * num_ranks(),
            seed=seed,
            on_progress=lambda done, _: bar.update(done - bar.n),
        )
    sys.stdout.write(table(report))
    if json is not None:
        text = "".join(spec.to_json() + "\n" for spec in specs)
        run = {
            **loaded.settings,
            "images_per_prompt": images_per_prompt,
            "seed": seed,
            "prompts": "make_prompts, test seeds" if prompts is None else prompts.name,
            "prompts_sha256": hashlib.sha256(text.encode("utf-8")).hexdigest(),
            "versions": library_versions(),
        }
        write_json(json, {**report.to_dict(), "run": run})


def table(report: SceneEvalReport) -> str:
    """Scores by task, for people."""
    lines = [f"{'task':<16}{'prompts':>8}{'images':>8}{'score':>8}{'seen':>8}{'unseen':>8}"]
    lines += [
        f"{task.task:<16}{task.prompts:>8}{task.images:>8}{_cell(task.score)}{_cell(task.seen)}{_cell(task.unseen)}"
        for task in report.tasks
    ]
    total = f"{_cell(report.overall)}{_cell(report.seen)}{_cell(report.unseen)}"
    lines.append(f"{'overall':<16}{report.prompts:>8}{report.images:>8}{total}")
    return "\n".join([*lines, report.protocol]) + "\n"


def _cell(value: float | None) -> str:
    return f"{'-' if value is None else format(value, '.3f'):>8}"
