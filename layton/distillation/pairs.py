"""Pairs of noise and a teacher's latent, made once and read many times (InstaFlow, arXiv 2309.06380, section 3).

On disk a set of pairs is a cache (`layton.data.cache`): parts of a few thousand samples as safetensors, and
``cache.json``, written last; ``plan.json``, written first, says what the parts are made by. Noise is not stored but its
seed is: it is drawn again when a pair is read, and with the teacher at hand the whole pair can be rebuilt. Making them
can be interrupted and shared between machines: every part is a pure function of its number, is written atomically, and
is skipped where it is there already.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.condition import Condition
from distill.denoiser import Denoiser
from distill.methods.pairs import DEFAULT_SOLVER, TeacherSolver
from distill.noise import gaussian_like
from layton.data.cache import CachedTensors, require_same
from layton.data.loader import collate
from layton.data.randomness import mix
from layton.data.sources import SampleSource
from layton.distillation.pair_files import CACHE_NAME, claim_folder, is_there, write_part
from layton.folder import write_text
from layton.lock import lock_folder
from layton.precision import quick_dtype

ConditionOf = Callable[[Mapping[str, Any]], Condition]
"""Batch of samples (``caption`` a list of B texts, tensors (B, ...)) to its condition."""

_DIGESTED = 512  # samples whose captions identify a set
_FORMAT = 1  # of `layton.data.cache`


@dataclass(frozen=True, slots=True)
class PairPlan:
    """Everything that decides what is in a set of pairs, but for the networks.

    Attributes:
        num_pairs: How many; more than there are samples gives each several noises.
        latent_shape: (C, h, w).
        solver: How the teacher turns noise into latents.
        seed: Of all noises.
        part_size: Pairs in a file; what an interruption costs at most.
        batch_size: Pairs made at once; part of the plan, because results may differ by rounding with it.
        keep: Names of the samples' own tensors that are stored beside, for example ``codes``.
    """

    num_pairs: int
    latent_shape: tuple[int, int, int]
    solver: TeacherSolver = DEFAULT_SOLVER
    seed: int = 0
    part_size: int = 1024
    batch_size: int = 32
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if min(self.num_pairs, self.part_size, self.batch_size) < 1:
            raise ValueError(f"num_pairs, part_size and batch_size must be >= 1, got {self}")

    @property
    def num_parts(self) -> int:
        """Number of files."""
        return -(-self.num_pairs // self.part_size)

    def fingerprint(self, *, teacher: str, captions: str) -> dict[str, str | int | float | bool]:
        """What identifies the set: this plan, the teacher's digest and that of the captions (`captions_digest`)."""
        solver = {f"solver_{name}": value for name, value in asdict(self.solver).items()}
        if self.solver.name == "euler":
            solver["solver_times"] = "flow"  # before, they were those of DDIM
        return {
            "kind": "pairs",
            "teacher": teacher,
            "captions": captions,
            "num_pairs": self.num_pairs,
            "latent_shape": "x".join(map(str, self.latent_shape)),
            "seed": self.seed,
            "part_size": self.part_size,
            "batch_size": self.batch_size,
            "keep": ",".join(self.keep),
            **solver,
        }


class PairSource(SampleSource):
    """A finished set of pairs as a source of training samples.

    A sample holds ``latent`` (C, h, w), ``noise`` (C, h, w) float32, ``seed``, ``caption``, ``key`` and what was kept.

    Args:
        folder: What `generate_pairs` wrote.
        in_memory: Read everything now.

    Raises:
        ValueError: The folder holds no finished set of pairs.
    """

    def __init__(self, folder: str, *, in_memory: bool = True) -> None:
        self.cache = CachedTensors(folder, in_memory=in_memory)
        if self.cache.fingerprint.get("kind") != "pairs":
            raise ValueError(f"{folder} holds a cache of something else than pairs")

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.cache)

    def sample(self, index: int, *, seed: int = 0) -> dict[str, Any]:
        """One pair; the argument ``seed`` has no influence, the stored one gives the noise."""
        found = self.cache.sample(index)
        return found | {"noise": noise_of([int(found["seed"])], tuple(found["latent"].shape))[0]}


def noise_of(seeds: Sequence[int], latent_shape: tuple[int, ...]) -> Tensor:
    """Noise (B, C, h, w) float32 of stored seeds, each sample's by itself, drawn on the CPU: the same everywhere."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return gaussian_like(torch.empty(len(seeds), *latent_shape), generators)


def generate_pairs(
    teacher: Denoiser,
    samples: SampleSource,
    condition_of: ConditionOf,
    folder: str | Path,
    plan: PairPlan,
    *,
    teacher_id: str,
    null: Condition | None = None,
    worker: int = 0,
    num_workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> PairSource | None:
    """Make the parts that are missing, and finish the set when all are there.

    Args:
        teacher: Frozen and unguided.
        samples: What to condition on: samples with ``key``, ``caption`` and perhaps tensors.
        condition_of: Encodes a batch of them, on the teacher's device.
        folder: Where to; one that holds parts of another plan or teacher is refused.
        plan: How many, how, from which seed.
        teacher_id: Digest of the teacher's weights (`layton.ldm.cache.digest`).
        null: What guidance guides away from, batch size 1.
        worker: This process makes the parts whose number modulo ``num_workers`` is this.
        num_workers: Processes, on any machines, that share ``folder``.
        progress: Called after each part with the number of this process's pairs that are there, and of all of them.

    Returns:
        The finished set, or None while other workers' parts are missing.

    Raises:
        CacheMismatchError: The folder holds parts made by something else.
        ValueError: A latent is not finite, ``worker`` is out of range, or a part is damaged.
    """
    if not 0 <= worker < num_workers:
        raise ValueError(f"worker must lie in [0, {num_workers}), got {worker}")
    root = Path(folder)
    fingerprint = plan.fingerprint(teacher=teacher_id, captions=captions_digest(samples, plan))
    claim_folder(root, fingerprint)
    mine = range(worker, plan.num_parts, num_workers)
    total = sum(len(_indices(plan, part)) for part in mine)
    done = 0
    for part in mine:
        count = len(_indices(plan, part))
        if not is_there(root / _name(part), count):
            write_part(root / _name(part), _make_part(teacher, samples, condition_of, plan, part, null))
        done += count
        if progress is not None:
            progress(done, total)
    if not all(is_there(root / _name(part), len(_indices(plan, part))) for part in range(plan.num_parts)):
        return None
    names = sorted(["latent", "seed", *plan.keep])
    parts = [{"file": _name(part), "samples": len(_indices(plan, part))} for part in range(plan.num_parts)]
    manifest = {"format": _FORMAT, "fingerprint": fingerprint, "tensors": names, "parts": parts}
    write_text(root / "cache.json", json.dumps(manifest, indent=1, sort_keys=True))
    return PairSource(str(root))


def made_once(folder: str, wanted: Mapping[str, Any], make: Callable[[], PairSource | None]) -> PairSource:
    """Pairs that are there, or are made now: of several processes one makes them, and the others find them made.

    Args:
        folder: Of the pairs.
        wanted: Their fingerprint.
        make: Makes what is missing.

    Raises:
        CacheMismatchError: The folder holds pairs made by something else.
    """
    made = _made_before(folder, wanted)
    if made is None:
        with lock_folder(Path(folder), wait=True):
            made = _made_before(folder, wanted) or make()
    if made is None:
        raise RuntimeError(f"{folder}: parts are missing, which other workers were to make")
    return made


def _made_before(folder: str, wanted: Mapping[str, Any]) -> PairSource | None:
    if not (Path(folder) / CACHE_NAME).is_file():
        return None
    source = PairSource(folder)
    require_same(Path(folder), source.cache.fingerprint, wanted)
    return source


def rebuild_pairs(
    source: PairSource,
    teacher: Denoiser,
    condition_of: ConditionOf,
    indices: Sequence[int],
    *,
    null: Condition | None = None,
) -> Tensor:
    """Latents (B, C, h, w) of stored pairs made anew from their seeds, captions and kept tensors.

    Equal to the stored ones up to the rounding of half precision, if the teacher is the same.
    """
    batch = collate([source.sample(index) for index in indices])
    stored = source.cache.fingerprint
    solver = TeacherSolver(
        name=str(stored["solver_name"]),  # type: ignore[arg-type]  # TeacherSolver checks
        num_steps=int(stored["solver_num_steps"]),
        guidance_scale=float(stored["solver_guidance_scale"]),
    )
    return _solve(teacher, solver, batch["noise"], condition_of(batch), null)


def _make_part(
    teacher: Denoiser,
    samples: SampleSource,
    condition_of: ConditionOf,
    plan: PairPlan,
    part: int,
    null: Condition | None,
) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    tensors: dict[str, list[Tensor]] = {}
    texts: dict[str, list[str]] = {"key": [], "caption": []}
    for indices in _chunks(_indices(plan, part), plan.batch_size):
        batch = collate([_numbered(samples, index, plan.seed) for index in indices])
        seeds = [mix(plan.seed, index) for index in indices]
        latents = _solve(teacher, plan.solver, noise_of(seeds, plan.latent_shape), condition_of(batch), null)
        if not bool(latents.isfinite().all()):
            raise ValueError(f"the teacher's latents are not finite in the batch that begins with {batch['key'][0]!r}")
        made = {"latent": latents.half(), "seed": torch.tensor(seeds), **{name: batch[name] for name in plan.keep}}
        for name, value in made.items():
            tensors.setdefault(name, []).append(value.detach().cpu())
        texts["key"] += batch["key"]
        texts["caption"] += batch["caption"]
    return {name: torch.cat(values).contiguous() for name, values in tensors.items()}, texts


def _solve(
    teacher: Denoiser, solver: TeacherSolver, noise: Tensor, condition: Condition, null: Condition | None
) -> Tensor:
    """The teacher's latents on the CPU; noise is moved to where its weights are.

    Products are bfloat16's where that is quicker; states stay float32, and latents are kept as float16.
    """
    device = next(iter([*teacher.parameters(), *teacher.buffers()]), noise).device
    dtype = quick_dtype(device)
    with torch.autocast(device.type, dtype, enabled=dtype is torch.bfloat16):
        return solver.solve(teacher, noise.to(device), condition, null).float().cpu()


def _numbered(samples: SampleSource, index: int, seed: int) -> dict[str, Any]:
    """Sample of a pair; later rounds through the samples get other keys."""
    around, row = divmod(index, len(samples))
    sample = dict(samples.sample(row, seed=mix(seed, index)))
    sample.setdefault("caption", "")
    return sample if around == 0 else sample | {"key": f"{sample['key']}~{around}"}


def captions_digest(samples: SampleSource, plan: PairPlan) -> str:
    """16 hex digits over keys and captions of pairs from all over a plan: a changed prompt file is another set.

    Of a source that cannot tell cheaply what all of it says, changes between these captions go unseen.
    """
    total = hashlib.sha256(samples.said().encode() if plan.num_pairs > _DIGESTED else b"")
    for step in range(min(plan.num_pairs, _DIGESTED)):
        sample = _numbered(samples, step * plan.num_pairs // min(plan.num_pairs, _DIGESTED), plan.seed)
        total.update(f"{sample['key']}\n{sample['caption']}\n".encode())
    return total.hexdigest()[:16]


def _indices(plan: PairPlan, part: int) -> range:
    return range(part * plan.part_size, min((part + 1) * plan.part_size, plan.num_pairs))


def _chunks(indices: range, size: int) -> Iterator[range]:
    return (indices[start : start + size] for start in range(0, len(indices), size))


def _name(part: int) -> str:
    return f"part-{part:05d}.safetensors"
