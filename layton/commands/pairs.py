"""``layton pairs``: noise and what a teacher makes of it, for reflow, one-step distillation and HiPA."""

from __future__ import annotations

from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from distill.methods.pairs import SolverName, TeacherSolver
from layton.data.prompts import PromptFile, SceneCaptions
from layton.data.sources import SampleSource
from layton.distillation.pairs import PairPlan
from layton.errors import UsageError


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
    device: str = "cpu",
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
        device: Where the teacher runs.

    Raises:
        UsageError: A number is out of range.
        ValueError: The folder holds pairs made by something else.
    """
    from layton.distillation.pair_data import open_or_make  # diffusers only when the command runs

    if min(num_pairs, steps, part_size, batch_size) < 1:
        raise UsageError("num_pairs, steps, part_size and batch_size must be at least 1")
    texts: SampleSource = SceneCaptions(length=num_pairs) if prompts is None else PromptFile(str(prompts))
    rule = TeacherSolver(solver, steps, guidance_scale)
    columns = (TextColumn("pairs"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("pairs", total=num_pairs)
        made = open_or_make(
            texts,
            pipeline,
            str(out),
            lambda shape: PairPlan(num_pairs, shape, rule, seed, part_size, batch_size),
            device=device,
            progress=lambda done, _: bar.update(task, completed=done),
        )
    print(f"{len(made)} pairs in {out}")
