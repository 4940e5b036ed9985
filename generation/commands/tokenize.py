"""``layton tokenize``: a dataset of images and captions to token shards."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from layton.data.geometry import FitPolicy
from layton.data.shards import absolute_pattern
from layton.data.stored import Columns
from layton.data.types import Split, check_split
from layton.errors import UsageError
from layton.options import require_least, require_shares
from layton.progress import progress
from layton.reports import write_json
from layton.scenes import Texture

if TYPE_CHECKING:
    from generation.data.tokenizing import ShardRunner, TokenizeJob
    from layton.data.sources import ImageSource

SCENES = "scenes"
SplitOrAll = Literal["train", "validation", "test", "all"]
_NAMED = 5  # broken images that are named on the terminal; all of them are in the manifest


def tokenize(
    sources: list[str],
    *,
    out: Path,
    tokenizer: str = "mini",
    policy: FitPolicy = "crop",
    split: SplitOrAll = "all",
    count: int | None = None,
    offset: int = 0,
    chinese: float = 0.0,
    reworded: float = 0.0,
    textures: list[Texture] | None = None,
    repeated_keys: bool = False,
    class_folders: bool = False,
    image_column: str | None = None,
    caption_column: str | None = None,
    id_column: str | None = None,
    shard_size: int = 4096,
    batch_size: int = 16,
    max_bad: int = 0,
    precision: Literal["fp32", "bf16"] = "fp32",
    text_encoder: str | None = None,
    text_length: int | None = None,
    text_cleaning: Literal["none", "deepfloyd"] = "none",
    workers: int = 0,
    cluster: str | None = None,
    isolate: bool = False,
    device: str | None = None,
    allow: list[str] | None = None,
    json: Path | None = None,
) -> int:
    """Encode a dataset to token shards, once; run again it continues where it was interrupted.

    Broken images are passed over, counted and named; more of them than allowed make exit status 1 at the end.

    Args:
        sources: tar shards (files or patterns), one folder of shards or of images, a table of Hugging Face's datasets
            (what it saved, or Parquet files; pip install 'layton[datasets]'), or the word scenes.
        out: folder to write; shards of codes, captions and keys, with plan.json and manifest.json.
        tokenizer: embedded tokenizer or folder.
        policy: how images become square: crop (the central square), pad (white borders) or resize.
        split: train, validation, test, or all (of scenes: train).
        count: scenes to render; 16384 by default. For stored images: all.
        offset: scenes to pass over at the beginning of the split.
        chinese: share of scene captions in Chinese.
        reworded: share of scene captions said in another way than the canonical one.
        textures: only scenes with one of these backgrounds; all by default.
        repeated_keys: accept shards that use the same keys; images are told apart by the shard's name as well.
        class_folders: captions are the names of the folders in which the images lie, such as ImageNet's.
        image_column: of a table; "image" by default.
        caption_column: of a table; by default caption, text, prompt or label, the first that there is.
        id_column: of a table, with unique names; keys are row numbers by default.
        shard_size: images in a shard.
        batch_size: images encoded at once.
        max_bad: broken images that are accepted.
        precision: of the encoder; bf16 is quicker on GPUs, changes about 3 % of the codes, and is recorded with them.
        text_encoder: also cache its features of the captions: a transformers folder or a diffusers pipeline.
        text_length: tokens of a caption that it reads.
        text_cleaning: what is done to captions before it reads them; deepfloyd as for released models (needs
            pip install 'layton[clean]'). A run file's text encoder must say the same.
        workers: processes that write shards, through Ray (pip install 'layton[scale]'), each with a GPU where there
            are any; 0 writes them in this one. The same bytes either way.
        cluster: address of a running Ray cluster for the workers; it must see sources and --out under the same paths.
        isolate: encode in a process of its own (each worker in one), so that an image that crashes it, or takes all
            memory, is found and passed over as a broken one; the model is in memory once more.
        device: where to run; the accelerator if there is one.
        allow: dotted names, or their beginnings, of classes of your own that a saved part may name.
        json: write figures to this file as well.
    """
    from generation.data.tokenizing import tokenize_dataset

    require_least(1, {"count": count, "shard_size": shard_size, "batch_size": batch_size, "text_length": text_length})
    require_least(0, {"offset": offset, "max_bad": max_bad})
    require_shares({"chinese": chinese, "reworded": reworded})
    for option, given in {"--text-length": text_length is not None, "--text-cleaning": text_cleaning != "none"}.items():
        if given and text_encoder is None:
            raise UsageError(f"{option} is of --text-encoder, which is not given")
    require_least(0, {"workers": workers})
    if cluster is not None and not workers:
        raise UsageError("--cluster needs --workers, how many processes it should run")
    started = time.perf_counter()
    make_job = partial(
        build_job,
        sources=list(sources) if sources == [SCENES] else [absolute_pattern(source) for source in sources],
        tokenizer=_absolute(tokenizer),
        policy=policy,
        split=split,
        count=count,
        offset=offset,
        chinese=chinese,
        reworded=reworded,
        textures=textures,
        repeated_keys=repeated_keys,
        class_folders=class_folders,
        columns=Columns(image_column, caption_column, id_column),
        shard_size=shard_size,
        batch_size=batch_size,
        precision=precision,
        text_encoder=None if text_encoder is None else _absolute(text_encoder),
        text_length=text_length,
        text_cleaning=text_cleaning,
        device=device,
        allow=tuple(allow or ()),
    )
    job = make_job(device="cpu") if workers or isolate else make_job()  # others take the GPUs
    elsewhere: ShardRunner | None = None
    if workers:
        from generation.data.scaling import RayRunner

        elsewhere = RayRunner(make_job, workers, cluster, isolate)
    elif isolate:
        from generation.data.isolation import IsolatedRunner

        elsewhere = IsolatedRunner(make_job)
    with progress(len(job.source), "tokenize") as bar:
        report = tokenize_dataset(job, out, on_progress=bar.update, elsewhere=elsewhere)
    seconds = time.perf_counter() - started
    sys.stdout.write(
        f"{out}: {report.samples} images in {report.shards} shards ({report.reused} were there), "
        f"{len(report.skipped)} passed over, {report.samples / seconds:.1f} images/s\n"
    )
    for reason in report.skipped[:_NAMED]:
        sys.stderr.write(f"layton: passed over {reason}\n")
    if len(report.skipped) > _NAMED:
        sys.stderr.write(f"layton: and {len(report.skipped) - _NAMED} more; the manifest names all of them\n")
    if len(report.skipped) > max_bad:
        sys.stderr.write(f"layton: {len(report.skipped)} passed over where --max-bad allows {max_bad}: exit status 1\n")
    if report.cut_captions:
        sys.stderr.write(f"layton: {report.cut_captions} captions were longer than the text encoder reads\n")
    if json is not None:
        write_json(json, {**asdict(report), "seconds": seconds, "header": asdict(job.header())})
    return int(len(report.skipped) > max_bad)


def build_job(
    *,
    sources: Sequence[str],
    tokenizer: str,
    policy: FitPolicy,
    split: SplitOrAll,
    count: int | None,
    offset: int,
    chinese: float,
    reworded: float,
    textures: list[Texture] | None,
    repeated_keys: bool,
    class_folders: bool,
    columns: Columns,
    shard_size: int,
    batch_size: int,
    precision: Literal["fp32", "bf16"],
    text_encoder: str | None,
    text_length: int | None,
    text_cleaning: Literal["none", "deepfloyd"],
    device: str | None,
    allow: tuple[str, ...],
) -> TokenizeJob:
    """The job of the command's arguments; workers make it anew from them."""
    from generation.data.tokenizing import TokenizeJob
    from generation.text.encoders import text_encoder as load_text_encoder
    from layton.devices import choose_device
    from layton.tokenizer import LaytonTokenizer

    model = LaytonTokenizer.from_pretrained(tokenizer, decoders=[], allow=allow).to(choose_device(device))
    source, name = open_source(
        sources,
        split=split,
        count=count,
        offset=offset,
        size=model.image_size,
        chinese=chinese,
        reworded=reworded,
        textures=textures,
        repeated_keys=repeated_keys,
        class_folders=class_folders,
        columns=columns,
    )
    encoder = None
    if text_encoder is not None:
        encoder = load_text_encoder(
            text_encoder, max_length=text_length, cleaning=None if text_cleaning == "none" else text_cleaning
        ).to(choose_device(device))
    return TokenizeJob(source, model, name, policy, shard_size, batch_size, encoder, precision=precision)


def _absolute(name: str) -> str:
    """A folder as workers with another working folder find it; names of embedded models stay."""
    return os.path.abspath(name) if Path(name).is_dir() else name


def open_source(
    sources: Sequence[str],
    *,
    split: str,
    count: int | None,
    offset: int,
    size: int,
    chinese: float,
    reworded: float,
    textures: list[Texture] | None = None,
    repeated_keys: bool = False,
    class_folders: bool = False,
    columns: Columns = Columns(),  # noqa: B008  # immutable
) -> tuple[ImageSource, str]:
    """The images that are meant, and a name for them.

    Raises:
        UsageError: If the arguments contradict each other.
        ValueError: If there are no such images.
    """
    from layton.data.sources import ScenesSource
    from layton.data.stored import open_stored

    known: Split | None = None if split == "all" else check_split(split)
    if not sources:
        raise UsageError("nothing to tokenize: name shards, a folder of images, or scenes")
    if list(sources) == [SCENES] and (class_folders or columns != Columns()):
        raise UsageError("scenes have neither --class-folders nor columns")
    if list(sources) == [SCENES]:
        scenes = ScenesSource(
            split=known or "train",
            length=16384 if count is None else count,
            size=size,
            offset=offset,
            chinese=chinese,
            reworded=reworded,
            textures=textures,
        )
        name = " ".join(
            [f"scenes {known or 'train'} {offset} {len(scenes)} {chinese:g} {reworded:g}", *(textures or [])]
        )
        return scenes, name
    if count is not None or offset or chinese or reworded or textures:
        raise UsageError("--count, --offset, --chinese, --reworded and --textures are for scenes alone")
    name = " ".join([Path(item).name for item in sources] + ([] if known is None else [known]))
    images = open_stored(sources, split=known, classes=class_folders, repeated_keys=repeated_keys, columns=columns)
    return images, name + " by classes" * class_folders
