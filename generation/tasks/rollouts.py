"""Images that a generator drew of scenes' captions, told apart by whether they show what was asked for.

What a judge must learn is how generated images fail, which real images with false captions show in part only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from generation.data.token_shards import (
    DRAWN_RIGHT,
    DRAWN_WRONG,
    FORMAT,
    TokenHeader,
    TokenShard,
    sha256_of,
    shard_name,
    write_manifest,
    write_shard,
)
from generation.pipeline import LaytonGenPipeline
from generation.tasks.rewards import Reward
from layton.data.sources import SampleSource
from layton.modules import weights_digest
from layton.staging import staged

RIGHT, WRONG = "right", "wrong"


@dataclass(frozen=True, slots=True)
class RolloutReport:
    """How many images of a generator were right.

    Attributes:
        right: Images that show what was asked for.
        wrong: All others.
    """

    right: int
    wrong: int


def draw_rollouts(
    pipeline: LaytonGenPipeline,
    prompts: SampleSource,
    reward: Reward,
    out: Path,
    *,
    images_per_prompt: int = 1,
    decoder: str | None = None,
    seed: int = 0,
    batch_size: int = 64,
    made_by: Mapping[str, object] | None = None,
    on_progress: Callable[[int], object] | None = None,
) -> RolloutReport:
    """Draw images, judge them, and write two token datasets, ``right`` and ``wrong``, which appear when both are whole.

    A side without images is not written. Nothing is kept of a run that was interrupted: for many images, make several
    of other prompts.

    Args:
        pipeline: Draws, one candidate of each image.
        prompts: Samples with ``caption`` and ``key``, such as `layton.data.prompts.SceneCaptions`.
        reward: An image is right that earns 1: of `generation.tasks.rewards.SceneReward` one that shows what is asked
            for and, with ``partial`` above 0, nothing else.
        out: Folder to write; must not exist.
        images_per_prompt: Images of each prompt.
        decoder: Of the pictures that are judged; the tokenizer's choice by default.
        seed: Of the first image; the following images count up from it.
        batch_size: Images drawn at once.
        made_by: How they are drawn, for the manifests.
        on_progress: Told how many images are done with.

    Raises:
        ValueError: If the folder exists, or numbers are out of range.
    """
    if out.exists():
        raise ValueError(f"{out} exists already")
    if images_per_prompt < 1 or batch_size < 1:
        raise ValueError(f"images_per_prompt and batch_size must be >= 1, got {images_per_prompt} and {batch_size}")
    tokenizer = pipeline.tokenizer
    wanted = [(index, number) for index in range(len(prompts)) for number in range(images_per_prompt)]
    kept: dict[bool, list[tuple[Tensor, str, str]]] = {True: [], False: []}
    for start in range(0, len(wanted), batch_size):
        part = wanted[start : start + batch_size]
        samples = [prompts.sample(index, seed=index) for index, _ in part]
        captions, keys = ([str(sample[name]) for sample in samples] for name in ("caption", "key"))
        generators = [torch.Generator().manual_seed(seed + start + row) for row in range(len(part))]
        drawn = pipeline(
            captions, candidates=1, generator=generators, decoder=decoder, output_type="pt", batch_size=len(part)
        )
        images = torch.as_tensor(drawn.images) * 2 - 1
        scores = reward.score(images, captions, keys, grid=tokenizer.grid).checked(len(part), tokenizer.grid)
        names = [f"drawn/{key.rpartition('/')[2]}-{number}" for key, (_, number) in zip(keys, part, strict=True)]
        for earned, row in zip(scores.total.tolist(), zip(drawn.codes, names, captions, strict=True), strict=True):
            kept[earned > 1 - 1e-6].append(row)
        if on_progress is not None:
            on_progress(len(part))
    header = TokenHeader(
        fingerprint=tokenizer.fingerprint(),
        vocab_size=tokenizer.vocab_size,
        num_tokens=tokenizer.num_tokens,
        image_size=tokenizer.image_size,
        encoder=weights_digest(tokenizer.encoder),
        policy=DRAWN_RIGHT,
    )
    with staged(out) as folder:
        for name, policy, rows in ((RIGHT, DRAWN_RIGHT, kept[True]), (WRONG, DRAWN_WRONG, kept[False])):
            if rows:
                _write(folder / name, replace(header, policy=policy), rows, made_by or {})
    return RolloutReport(len(kept[True]), len(kept[False]))


def _write(
    folder: Path, header: TokenHeader, rows: list[tuple[Tensor, str, str]], made_by: Mapping[str, object]
) -> None:
    """One token dataset of one shard."""
    shard = TokenShard(torch.stack([row[0] for row in rows]), [row[1] for row in rows], [row[2] for row in rows])
    path = folder / shard_name(0)
    folder.mkdir()
    write_shard(path, header, shard)
    entry = {"file": path.name, "samples": len(shard), "skipped": 0, "sha256": sha256_of(path)}
    counts = {"inputs": len(shard), "samples": len(shard), "skipped": 0}
    about = {"format": FORMAT, "header": asdict(header), "source": header.policy, "made_by": dict(made_by)}
    write_manifest(folder, {**about, "shards": [entry], "counts": counts, "skipped": []})
