"""Pairs made by a pipeline when they are first asked for: the data of reflow, one-step distillation and HiPA."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from distill.condition import Condition
from distill.methods.pairs import DEFAULT_SOLVER, TeacherSolver
from distill.models import denoiser_from_pipeline
from layton.assets import find_pipeline
from layton.data.sources import SampleSource
from layton.devices import choose_device
from layton.distillation.pair_files import folder_for
from layton.distillation.pairs import PairPlan, PairSource, captions_digest, generate_pairs, made_once
from layton.ldm.cache import digest
from layton.ldm.conditions import NETWORK_GUIDANCE, PromptEncoder, latent_shape_of, takes_guidance
from layton.ldm.teacher import open_outline, open_pipeline
from layton.precision import quick_dtype

_NETWORKS = ("unet", "transformer")


class TeacherPairs(SampleSource):
    """A source of pairs (noise, latent, caption), made by a pipeline when first asked for and then read from disk.

    Samples are those of `layton.distillation.pairs.PairSource`. An interrupted run goes on with the part it was at.

    Args:
        prompts: Gives captions; pictures are ignored.
        pipeline: Folder of the teacher. For k-rectified flow, the export of the run before.
        folder: Where the pairs lie; if other ones lie there, of another teacher or solver for instance, beside it, in a
            folder named by what makes these.
        solver: How the teacher turns noise into latents.
        num_pairs: How many; more than there are prompts gives each several noises. None: one for each prompt.
        seed: Of all noises.
        part_size: Pairs in a file.
        batch_size: Pairs made at once.
        latent_size: h = w; by default what the pipeline makes by default.
        network_guidance: What a network with guidance for an input is told (FLUX dev); of no effect on others.
        negative_prompt: What a guided teacher is led away from; None is the pipeline's own default.
        device: Where the teacher runs while pairs are made; the accelerator if there is one. Of several ranks one makes
            them while the others wait; ``layton pairs`` makes them beforehand.
    """

    def __init__(
        self,
        prompts: SampleSource,
        *,
        pipeline: str,
        folder: str,
        solver: TeacherSolver = DEFAULT_SOLVER,
        num_pairs: int | None = None,
        seed: int = 0,
        part_size: int = 1024,
        batch_size: int = 32,
        latent_size: int | None = None,
        network_guidance: float = NETWORK_GUIDANCE,
        negative_prompt: str | None = None,
        device: str | None = None,
    ) -> None:
        count = len(prompts) if num_pairs is None else num_pairs
        self.solver, self.negative_prompt = solver, negative_prompt
        self.teacher = teacher_told(find_pipeline(pipeline), network_guidance)
        self._open = partial(
            open_or_make,
            prompts,
            pipeline,
            folder,
            lambda shape: PairPlan(count, shape, solver, seed, part_size, batch_size),
            latent_size=latent_size,
            network_guidance=network_guidance,
            negative_prompt=negative_prompt,
            device=device,
            beside=True,
        )

    @cached_property
    def _source(self) -> PairSource:
        """Made when they are asked for: a run that does not fit them is refused before."""
        return self._open()

    def __getstate__(self) -> dict[str, Any]:
        """What a worker gets: the pairs, which by then are there."""
        return {"_source": self._source, "_open": None} | {
            name: getattr(self, name) for name in ("solver", "negative_prompt", "teacher")
        }

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self._source)

    def sample(self, index: int, *, seed: int) -> dict[str, Any]:
        """One pair; the seed has no influence."""
        return self._source.sample(index)


def _say(done: int, total: int) -> None:
    sys.stderr.write(f"layton: {done:,} of {total:,} pairs are made\n")


def open_or_make(
    prompts: SampleSource,
    pipeline: str,
    folder: str,
    plan_of: Callable[[tuple[int, int, int]], PairPlan],
    *,
    latent_size: int | None = None,
    network_guidance: float = NETWORK_GUIDANCE,
    negative_prompt: str | None = None,
    device: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    beside: bool = False,
) -> PairSource:
    """Open a set of pairs, or make what is missing of it.

    Args:
        prompts: Gives captions.
        pipeline: Folder of the teacher.
        folder: Of the pairs.
        plan_of: The plan for a latent shape (C, h, w).
        latent_size: h = w; by default the pipeline's.
        network_guidance: See `TeacherPairs`.
        negative_prompt: See `TeacherPairs`.
        device: Where the teacher runs; the accelerator if there is one.
        progress: See `layton.distillation.pairs.generate_pairs`.
        beside: Take another folder beside where this one holds pairs made by something else.

    Raises:
        CacheMismatchError: The folder holds pairs made by something else.
    """
    root = find_pipeline(pipeline)
    outline = open_outline(root)  # pairs that are there need no teacher
    shape = latent_shape_of(outline, latent_size)
    plan = plan_of(shape)
    teacher_id = teacher_told(root, network_guidance)
    if negative_prompt is not None and plan.solver.is_guided:
        teacher_id += f"-away-{hashlib.sha256(negative_prompt.encode()).hexdigest()[:8]}"
    wanted = plan.fingerprint(teacher=teacher_id, captions=captions_digest(prompts, plan))
    folder = str(folder_for(Path(folder), wanted)) if beside else folder

    def make() -> PairSource | None:
        place = choose_device(device)
        on_cpu = place.type == "cpu"  # where products alone are of the quick type
        pipe = open_pipeline(root, dtype=torch.float32 if on_cpu else quick_dtype(place))
        encoder = PromptEncoder(pipe, latent_size=shape[1:], guidance_scale=network_guidance)
        teacher = denoiser_from_pipeline(pipe, latent_size=shape[1:]).eval().to(place)
        null = encoder.null(negative_prompt, device=place) if plan.solver.is_guided else None

        def condition_of(batch: Mapping[str, Any]) -> Condition:
            return encoder(batch["caption"], device=place)

        return generate_pairs(
            teacher, prompts, condition_of, folder, plan, teacher_id=teacher_id, null=null, progress=progress or _say
        )

    return made_once(folder, wanted, make)


def teacher_told(pipeline: Path, network_guidance: float) -> str:
    """`teacher_digest`, and what the network is told of its guidance, if it hears any."""
    told = takes_guidance(open_outline(pipeline)) and network_guidance != NETWORK_GUIDANCE
    return teacher_digest(pipeline) + (f"-told-{network_guidance:g}" if told else "")


def teacher_digest(pipeline: Path) -> str:
    """Hex digits over what decides a pair: the weights of network and text encoders, and the noise schedule.

    Files are read once in a process, as long as they stay as they are.

    Raises:
        ValueError: The folder has neither.
    """
    stamps = (path.stat() for path in sorted(pipeline.rglob("*.safetensors")))
    return _teacher_digest(pipeline, tuple((each.st_ino, each.st_size, each.st_mtime_ns) for each in stamps))


@lru_cache(maxsize=8)
def _teacher_digest(pipeline: Path, _: tuple[tuple[int, int, int], ...]) -> str:
    parts = [pipeline / name for name in (*_NETWORKS, "text_encoder", "text_encoder_2", "text_encoder_3")]
    found = [digest(part) for part in parts if part.is_dir()]
    if not found:
        raise ValueError(f"{pipeline} holds no network")
    scheduler = pipeline / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():
        found.append(hashlib.sha256(scheduler.read_bytes()).hexdigest()[:8])
    return "-".join(found)
