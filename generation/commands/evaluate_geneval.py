"""``layton evaluate geneval``: images in GenEval's folder layout, and the official scorer's results summed up."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from generation.drawers import DrawerOptions, load_drawer
from generation.sampling.choice import SamplingChoice
from layton.errors import UsageError
from layton.folder import write_json
from layton.options import changed_options, refuse_given, require_least
from layton.progress import progress

if TYPE_CHECKING:
    from generation.evaluation.geneval import GenEvalScores

_DRAWER, _SAMPLING = DrawerOptions(), SamplingChoice()


def evaluate_geneval(
    *,
    drawer: DrawerOptions = _DRAWER,
    sampling: SamplingChoice = _SAMPLING,
    prompts: Path | None = None,
    out: Path | None = None,
    results: Path | None = None,
    images_per_prompt: int = 4,
    seed: int = 42,
    json: Path | None = None,
) -> None:
    """Draw the images that GenEval's official scorer reads, or sum up the results file that it wrote.

    The scorer itself needs a detector and CLIP and is no part of this library. First --prompts with --out, then the
    scorer (github.com/djghosh13/geneval) on the folder, then --results. Run again, drawing goes on where it stopped.

    Args:
        drawer: which model draws.
        sampling: how.
        prompts: GenEval's evaluation_metadata.jsonl, or any file in its form.
        out: folder for the images; settings.json in it says how they were drawn.
        results: the scorer's results file, to be summed up.
        images_per_prompt: images for each prompt; published scores have 4.
        seed: of the first image of every prompt.
        json: write settings, or scores, to this file as well.
    """
    from generation.evaluation.geneval import read_prompts, run_geneval, summarise_results

    if (prompts is None) != (out is None) or (prompts is None and results is None):
        raise UsageError("give --prompts with --out to draw images, or --results to sum up, or all three")
    require_least(1, {"images_per_prompt": images_per_prompt})
    require_least(0, {"seed": seed})
    if prompts is None:
        given = {**changed_options(drawer, _DRAWER), **changed_options(sampling, _SAMPLING)}
        refuse_given(given, "of drawing, and without --prompts nothing is drawn")
    figures: dict[str, Any] = {}
    if prompts is not None and out is not None:
        lines = read_prompts(prompts)
        loaded = load_drawer(drawer, sampling)
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
