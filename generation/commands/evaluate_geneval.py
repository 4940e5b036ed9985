"""``layton evaluate geneval``: images in GenEval's folder layout, and the official scorer's results summed up."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from generation.choice import SamplingChoice
from generation.commands.models import Kind, load_drawer
from generation.commands.options import Weights, require_least
from layton.commands.calling import progress
from layton.commands.reports import write_json
from layton.errors import UsageError

if TYPE_CHECKING:
    from generation.geneval import GenEvalScores


def evaluate_geneval(
    *,
    prompts: Path | None = None,
    out: Path | None = None,
    results: Path | None = None,
    model: str = "mini",
    kind: Kind = "laytongen",
    student: str | None = None,
    planner: str | None = None,
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
    images_per_prompt: int = 4,
    seed: int = 42,
    device: str | None = None,
    allow: list[str] | None = None,
    json: Path | None = None,
) -> None:
    """Draw the images that GenEval's official scorer reads, or sum up the results file that it wrote.

    The scorer itself needs a detector and CLIP and is no part of this library. First --prompts with --out, then the
    scorer (github.com/djghosh13/geneval) on the folder, then --results. Run again, drawing goes on where it stopped.

    Args:
        prompts: GenEval's evaluation_metadata.jsonl, or any file in its form.
        out: folder for the images; settings.json in it says how they were drawn.
        results: the scorer's results file, to be summed up.
        model: embedded model or folder.
        kind: laytongen, or diffusion for a diffusers text-to-image folder.
        student: export of `layton distill` on a diffusers pipeline, or mini; it draws as it was trained to.
        planner: embedded model or folder of a LaytonGen, whose planner says prompts anew with places, for a diffusion
            model that learnt such prompts.
        tokenizer: of LaytonGen, where it does not lie beside the generator.
        decoder: name of the code decoder; the tokenizer's own choice by default.
        steps: of the decoder, or of the diffusion model; its own number by default.
        guidance_scale: of classifier-free guidance; the model's own by default.
        temperature: of LaytonGen; 0 takes the likeliest code each time.
        top_k: of LaytonGen; 0 for all codes.
        top_p: of LaytonGen; 1 for all codes.
        min_entropy: of LaytonGen, in nats; where it is surer of the next code, that is drawn plainly.
        candidates: of LaytonGen, images drawn for each one that is kept: the one that its judge likes best.
        no_layout: draw from prompts alone, without the planner that LaytonGen may have.
        weights: of LaytonGen while it draws: bf16, or int8 on a CPU, to be quicker; by default as they are saved.
        images_per_prompt: images for each prompt; published scores have 4.
        seed: of the first image of every prompt.
        device: where to run; the accelerator if there is one.
        allow: dotted names, or their beginnings, of classes of your own that a saved part may name.
        json: write settings, or scores, to this file as well.
    """
    from generation.geneval import read_prompts, run_geneval, summarise_results

    if (prompts is None) != (out is None) or (prompts is None and results is None):
        raise UsageError("give --prompts with --out to draw images, or --results to sum up, or all three")
    require_least(1, {"images_per_prompt": images_per_prompt})
    require_least(0, {"seed": seed})
    figures: dict[str, Any] = {}
    if prompts is not None and out is not None:
        lines = read_prompts(prompts)
        sampling = SamplingChoice(
            guidance_scale,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_entropy=min_entropy,
            candidates=candidates,
            no_layout=no_layout,
        )
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
        settings = {**loaded.settings, "prompts_sha256": hashlib.sha256(prompts.read_bytes()).hexdigest()}
        with progress(len(lines) * images_per_prompt, "draw") as bar:
            drawn = run_geneval(
                loaded.draw,
                lines,
                out,
                settings=settings,
                images_per_prompt=images_per_prompt,
                seed=seed,
                on_progress=bar.update,
            )
        figures["settings"] = {**settings, "images_per_prompt": images_per_prompt, "seed": seed}
        sys.stdout.write(f"{out}: {len(lines)} prompts x {images_per_prompt} images, {drawn} drawn now\n")
    if results is not None:
        scores = summarise_results(results)
        figures["scores"] = scores.to_dict()
        sys.stdout.write(table(scores))
    if json is not None:
        write_json(json, figures)


def table(scores: GenEvalScores) -> str:
    """Scores for people."""
    rows = [f"{task:<16}{score:>8.3f}" for task, score in scores.tasks.items()]
    rows.append(f"{'overall':<16}{scores.overall:>8.3f}")
    rows.append(f"{scores.correct_images:.1%} of {scores.images} images, {scores.correct_prompts:.1%} of prompts right")
    if not scores.complete:
        rows.append("not the whole of GenEval (553 prompts, 4 images each): not comparable with published scores")
    return "\n".join(rows) + "\n"
