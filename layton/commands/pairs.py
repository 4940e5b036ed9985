"""``layton pairs``: noise and what a teacher makes of it, for reflow, one-step distillation and HiPA."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from distill.methods.pairs import SolverName, TeacherSolver
from layton.data.prompts import PromptFile, SceneCaptions
from layton.data.sources import SampleSource
from layton.distillation.pairs import PairPlan
from layton.options import require_least, require_shares
from layton.progress import progress


def pairs(
    pipeline: str,
    *,
    out: Path,
    prompts: Path | None = None,
    count: int = 1024,
    solver: SolverName = "dpmpp_2m",
    steps: int = 25,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    split: Literal["train", "all"] = "train",
    chinese: float = 0.12,
    reworded: float = 0.6,
    latent_size: int | None = None,
    network_guidance: float | None = None,
    seed: int = 0,
    part_size: int = 1024,
    batch_size: int = 32,
    device: str | None = None,
) -> None:
    """Make pairs of noise and latent with a diffusers pipeline as the teacher; run again to go on where it stopped.

    Args:
        pipeline: Folder of the pipeline, or the name of an embedded model.
        out: Folder of the pairs.
        prompts: Text file with one prompt on each line; by default captions of training Scenes, with places for a
            pipeline that hears them.
        count: How many; more than there are prompts gives each several noises.
        solver: What integrates from noise to latent.
        steps: Its steps.
        guidance_scale: Guidance of the teacher; 1 is none. By default 5, as in the run files, or 1 where the network
            hears its guidance (FLUX), as `layton distill` has it.
        negative_prompt: What a guided teacher is led away from; the pipeline's own default by default.
        split: Of the prompts file, the lines that train, as `layton distill --prompts` takes them, or all.
        chinese: Share of captions of Scenes in Chinese; by default as in the run files, which then find these pairs.
        reworded: Share of captions of Scenes said in another way than the canonical one; likewise.
        latent_size: h = w of the latents; the pipeline's own by default.
        network_guidance: Told to networks that hear their guidance (FLUX); 3.5 by default.
        seed: Of all noises; each pair keeps its own, so that it can be rebuilt.
        part_size: Pairs in a file: what an interruption costs at most.
        batch_size: Pairs made at once.
        device: Where the teacher runs; the accelerator if there is one.
    """
    from layton.assets import find_pipeline
    from layton.commands.distill import hears_guidance, hears_places
    from layton.distillation.pair_data import open_or_make  # diffusers only when the command runs
    from layton.ldm.conditions import NETWORK_GUIDANCE

    require_least(1, {"count": count, "steps": steps, "part_size": part_size, "batch_size": batch_size})
    require_least(1, {"latent_size": latent_size})
    require_shares({"chinese": chinese, "reworded": reworded})
    folder = find_pipeline(pipeline)
    if guidance_scale is None:
        guidance_scale = 1.0 if hears_guidance(folder) else 5.0
    texts: SampleSource
    if prompts is None:
        places = 1.0 if hears_places(folder) else 0.0
        texts = SceneCaptions(length=count, chinese=chinese, reworded=reworded, places=places)
    else:
        texts = PromptFile(str(prompts), split="train" if split == "train" else None)
    rule = TeacherSolver(solver, steps, guidance_scale)
    with progress(count, "pairs") as bar:
        made = open_or_make(
            texts,
            pipeline,
            str(out),
            lambda shape: PairPlan(count, shape, rule, seed, part_size, batch_size),
            latent_size=latent_size,
            network_guidance=NETWORK_GUIDANCE if network_guidance is None else network_guidance,
            negative_prompt=negative_prompt,
            device=device,
            progress=lambda done, _: bar.update(done - bar.n),
        )
    sys.stdout.write(f"{out}: {len(made)} pairs\n")
