"""``layton evaluate sceneval``: does a text-to-image pipeline draw what it is told?"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layton.commands.calling import progress
from layton.commands.reports import write_json
from layton.commands.text_to_image import DEFAULT_GUIDANCE, DEFAULT_STEPS, TextToImage, find_pipeline
from layton.errors import UsageError

if TYPE_CHECKING:
    from layton.sceneval import PromptSpec, SceneEvalReport


def evaluate_sceneval(
    *,
    pipeline: str = "mini",
    student: Path | None = None,
    prompts: Path | None = None,
    per_task: int = 50,
    images_per_prompt: int = 4,
    steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    batch_size: int = 16,
    out: Path | None = None,
    device: str | None = None,
    json: Path | None = None,
) -> None:
    """Score a text-to-image pipeline on the Scenes prompts, in GenEval's form and on a scale of its own.

    Args:
        pipeline: folder of any diffusers text-to-image pipeline, an embedded model, or a tokenizer folder with ldm/.
        student: export of `layton distill` on this pipeline, which then draws as it was trained to.
        prompts: file of prompts in GenEval's JSON lines; by default they are made from test seeds.
        per_task: prompts made for each of the six tasks, a fifth of them of unseen combinations where there are such.
        images_per_prompt: images drawn for each prompt.
        steps: denoising steps, 25 by default; of a student one of its own numbers, by default the largest.
        guidance_scale: of classifier-free guidance, 4 by default; 1 is none. A student has its own.
        seed: of the first image; the following images count up from it.
        batch_size: images drawn at once; the score does not depend on it.
        out: folder for the images in GenEval's layout; must be new or empty.
        device: where to run; the accelerator if there is one.
        json: write scores and protocol to this file as well.
    """
    from layton.sceneval import make_prompts, read_prompts, run_sceneval

    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is not empty: images of another run there would be counted as this one's")
    specs = make_prompts(per_task) if prompts is None else read_prompts(prompts)
    folder = find_pipeline(pipeline)
    draw = drawer(folder, student, steps=steps, guidance_scale=guidance_scale, device=device)
    with progress(len(specs) * images_per_prompt, "draw") as bar:
        report = run_sceneval(
            draw,
            specs,
            images_per_prompt,
            out,
            batch_size=batch_size,
            seed=seed,
            on_progress=lambda done, _: bar.update(done - bar.n),
        )
    sys.stdout.write(table(report))
    if json is not None:
        source = "make_prompts, test seeds" if prompts is None else str(prompts)
        write_json(json, {**report.to_dict(), "run": _run(draw, pipeline, source, specs, images_per_prompt, seed)})


def drawer(
    folder: Path, student: Path | None, *, steps: int | None, guidance_scale: float | None, device: str | None
) -> TextToImage:
    """A pipeline, or a distilled student of it, ready to draw.

    Raises:
        UsageError: If a student is given a guidance scale.
        ValueError: If one of them cannot be read, or the student is not trained for so many steps.
    """
    if student is None:
        num_steps = DEFAULT_STEPS if steps is None else steps
        scale = DEFAULT_GUIDANCE if guidance_scale is None else guidance_scale
        return TextToImage.load(folder, num_steps=num_steps, guidance_scale=scale, device=device)
    if guidance_scale is not None:
        raise UsageError("a student has a guidance of its own: leave --guidance-scale out")
    return TextToImage.load_student(folder, student, num_steps=steps, device=device)


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


def _run(
    draw: TextToImage, name: str, source: str, specs: list[PromptSpec], images_per_prompt: int, seed: int
) -> dict[str, Any]:
    import torch

    from layton.metrics.protocol import library_versions
    from layton.modules import weights_digest

    networks = [draw.pipeline.components[name] for name in sorted(draw.pipeline.components)]
    text = "".join(spec.to_json() + "\n" for spec in specs)
    return {
        "pipeline": name,
        "pipeline_class": type(draw.pipeline).__name__,
        "weights": weights_digest(*(part for part in networks if isinstance(part, torch.nn.Module))),
        "scheduler": type(draw.pipeline.scheduler).__name__,
        "student": draw.student,
        "num_inference_steps": draw.num_steps,
        "guidance_scale": draw.guidance_scale,
        "images_per_prompt": images_per_prompt,
        "seed": seed,
        "prompts": source,
        "prompts_sha256": hashlib.sha256(text.encode("utf-8")).hexdigest(),
        "versions": library_versions(),
    }
