"""``layton evaluate sceneval`` for LaytonGen as well as for diffusion models."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from generation.choice import SamplingChoice
from generation.commands.models import Kind, load_drawer
from generation.commands.options import Weights, require_least
from layton.commands.calling import progress
from layton.commands.evaluate_sceneval import evaluate_sceneval as evaluate_diffusion
from layton.commands.evaluate_sceneval import table
from layton.commands.reports import write_json
from layton.errors import UsageError


def evaluate_sceneval(
    *,
    pipeline: str = "mini",
    kind: Kind = "diffusion",
    student: Path | None = None,
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
        pipeline: embedded model, folder of a diffusers text-to-image pipeline, or folder of a LaytonGen.
        kind: diffusion, or laytongen.
        student: export of `layton distill` on a diffusers pipeline, which then draws as it was trained to.
        prompts: file of prompts in GenEval's JSON lines; by default they are made from test seeds.
        per_task: prompts made for each of the six tasks, a fifth of them of unseen combinations where there are such.
        images_per_prompt: images drawn for each prompt.
        tokenizer: of LaytonGen, where it does not lie beside the generator.
        decoder: name of LaytonGen's code decoder; the tokenizer's own choice by default.
        steps: denoising steps (25 by default), a student's, or those of LaytonGen's decoder.
        guidance_scale: of classifier-free guidance; 1 is none.
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
    if kind == "diffusion":
        if sampling.given() or any(value is not None for value in (tokenizer, decoder, weights, allow)):
            raise UsageError("tokenizer, decoder, weights, allow and how codes are drawn need --kind laytongen")
        evaluate_diffusion(
            pipeline=pipeline,
            student=student,
            prompts=prompts,
            per_task=per_task,
            images_per_prompt=images_per_prompt,
            steps=steps,
            guidance_scale=guidance_scale,
            seed=seed,
            batch_size=batch_size,
            out=out,
            device=device,
            json=json,
        )
        return
    if student is not None:
        raise UsageError("--student is of a diffusers pipeline, not of --kind laytongen")
    from layton.metrics.protocol import library_versions
    from layton.sceneval import make_prompts, read_prompts, run_sceneval

    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is not empty: images of another run there would be counted as this one's")
    specs = make_prompts(per_task) if prompts is None else read_prompts(prompts)
    loaded = load_drawer(
        kind,
        pipeline,
        tokenizer=tokenizer,
        decoder=decoder,
        steps=steps,
        sampling=sampling,
        weights=weights,
        device=device,
        allow=allow,
    )
    with progress(len(specs) * images_per_prompt, "draw") as bar:
        report = run_sceneval(
            loaded.draw,
            specs,
            images_per_prompt,
            out,
            batch_size=batch_size,
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
