"""``layton evaluate sceneval`` for LaytonGen and for diffusion models."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from generation.choice import SamplingChoice
from generation.commands.models import Kind, load_drawer
from generation.commands.options import Weights, require_least
from layton.commands.calling import progress
from layton.commands.reports import write_json
from layton.errors import UsageError

if TYPE_CHECKING:
    from layton.sceneval import SceneEvalReport


def evaluate_sceneval(
    *,
    model: str = "mini",
    kind: Kind = "laytongen",
    student: str | None = None,
    planner: str | None = None,
    prompts: Path | None = None,
    per_task: int = 50,
    images_per_prompt: int = 4,
    tokenizer: str | None = None,
    decoder: str | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_entropy: float | None = None,
    candidates: int | None = None,
    no_layout: bool = False,
    weights: Weights | None = None,
    seed: int = 0,
    batch_size: int = 16,
    out: Path | None = None,
    device: str | None = None,
    allow: list[str] | None = None,
    json: Path | None = None,
) -> None:
    """Score a text-to-image model on the Scenes prompts, in GenEval's form and on a scale of its own.

    Args:
        model: embedded model or folder.
        kind: laytongen, or diffusion for a diffusers text-to-image folder.
        student: export of `layton distill` on a diffusers pipeline, or mini; it draws as it was trained to.
        planner: embedded model or folder of a LaytonGen, whose planner says prompts anew with places, for a diffusion
            model that learnt such prompts.
        prompts: file of prompts in GenEval's JSON lines; by default they are made from test seeds.
        per_task: prompts made for each of the six tasks, a fifth of them of unseen combinations where there are such.
        images_per_prompt: images drawn for each prompt.
        tokenizer: of LaytonGen, where it does not lie beside the generator.
        decoder: name of LaytonGen's code decoder; the tokenizer's own choice by default.
        steps: denoising steps (25 by default), a student's, or those of LaytonGen's decoder.
        guidance_scale: of classifier-free guidance, 1 is none; LaytonGen's own, or 3 for a diffusion model by default.
        temperature: of LaytonGen; 0 takes the likeliest code each time.
        top_k: of LaytonGen; 0 for all codes.
        top_p: of LaytonGen; 1 for all codes.
        min_entropy: of LaytonGen, in nats; where it is surer of the next code, that is drawn plainly.
        candidates: of LaytonGen, images drawn for each one that is kept: the one that its judge likes best.
        no_layout: draw from prompts alone, without the planner that LaytonGen may have.
        weights: of LaytonGen while it draws: bf16, or int8 on a CPU, to be quicker; by default as they are saved.
        seed: of the first image; the following images count up from it.
        batch_size: images drawn at once, each with its candidates; the score does not depend on it.
        out: folder for the images in GenEval's layout; must be new or empty.
        device: where to run; the accelerator if there is one.
        allow: dotted names, or their beginnings, of classes of your own that a saved part may name.
        json: write scores and protocol to this file as well.
    """
    require_least(1, {"per_task": per_task, "images_per_prompt": images_per_prompt, "batch_size": batch_size})
    require_least(0, {"seed": seed})
    sampling = SamplingChoice(
        guidance_scale,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_entropy=min_entropy,
        candidates=candidates,
        no_layout=no_layout,
    )
    from layton.metrics.protocol import library_versions
    from layton.quiet import cut_captions_told_once
    from layton.ranks import num_ranks, own_rank
    from layton.sceneval import make_prompts, read_prompts, run_sceneval

    out = out if own_rank() == 0 else None
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is not empty: images of another run there would be counted as this one's")
    specs = make_prompts(per_task) if prompts is None else read_prompts(prompts)
    loaded = load_drawer(
        kind,
        model,
        student=student,
        planner=planner,
        tokenizer=tokenizer,
        decoder=decoder,
        steps=steps,
        sampling=sampling,
        weights=weights,
        device=device,
        allow=allow,
    )
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
