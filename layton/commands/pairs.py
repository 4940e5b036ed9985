"""``layton pairs``: noise and what a teacher makes of it, for reflow, one-step distillation and HiPA."""

from __future__ import annotations

import sys
from pathlib import Path

from distill.methods.pairs import SolverName, TeacherSolver
from layton.commands.calling import progress
from layton.commands.options import require_least
from layton.data.prompts import PromptFile, SceneCaptions
from layton.data.sources import SampleSource
from layton.distillation.pairs import PairPlan


def pairs(
    pipeline: str,
    *,
    out: Path,
    prompts: Path | None = None,
    num_pairs: int = 1024,
    solver: SolverName = "dpmpp_2m",
    steps: int = 25,
    guidance_scale: float = 5.0,
    seed: int = 0,
    part_size: int = 1024,
    batch_size: int = 32,
    device: str | None = None,
) -> None:
    """Make pairs of noise and latent with a diffusers pipeline as the teacher; run again to go on where it stopped.

    Args:
        pipeline: Folder of the pipeline, or the name of an embedded model.
        out: Folder of the pairs.
        prompts: Text file with one prompt on each line; by default captions of training Scenes.
        num_pairs: How many; more than there are prompts gives each several noises.
        solver: What integrates from noise to latent.
        steps: Its steps.
        guidance_scale: Guidance of the teacher; 1 is none.
        seed: Of all noises; each pair keeps its own, so that it can be rebuilt.
        part_size: Pairs in a file: what an interruption costs at most.
        batch_size: Pairs made at once.
        device: Where the teacher runs; the accelerator if there is one.
    """
    from layton.distillation.pair_data import open_or_make  # diffusers only when the command runs

    require_least(1, {"num_pairs": num_pairs, "steps": steps, "part_size": part_size, "batch_size": batch_size})
    texts: SampleSource = SceneCaptions(length=num_pairs) if prompts is None else PromptFile(str(prompts))
    rule = TeacherSolver(solver, steps, guidance_scale)
    with progress(num_pairs, "pairs") as bar:
        made = open_or_make(
            texts,
            pipeline,
            str(out),
            lambda shape: PairPlan(num_pairs, shape, rule, seed, part_size, batch_size),
            device=device,
            progress=lambda done, _: bar.update(done - bar.n),
        )
    sys.stdout.write(f"{out}: {len(made)} pairs\n")
