"""``layton tokenize``: a dataset of images and captions to token shards."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from generation.data.inputs import ImageOptions, JobOptions, absolute, make_job
from layton.errors import UsageError
from layton.folder import write_json
from layton.options import require_least
from layton.progress import progress

if TYPE_CHECKING:
    from generation.data.tokenizing import ShardRunner, TokenizeReport

_NAMED = 5  # broken images that are named on the terminal; all of them are in the manifest
_IMAGES, _JOB = ImageOptions(), JobOptions()


def tokenize(
    sources: list[str],
    *,
    out: Path,
    images: ImageOptions = _IMAGES,
    options: JobOptions = _JOB,
    max_bad: int = 0,
    workers: int = 0,
    cluster: str | None = None,
    isolate: bool = False,
    json: Path | None = None,
) -> int:
    """Encode a dataset to token shards, once; run again it continues where it was interrupted.

    Broken images are passed over, counted and named; more of them than allowed make exit status 1 at the end.

    Args:
        sources: tar shards (files or patterns), one folder of shards or of images, a table of Hugging Face's datasets
            (what it saved, or Parquet files; pip install 'layton[datasets]'), or the word scenes.
        out: folder to write; shards of codes, captions and keys, with plan.json and manifest.json.
        images: which images of the sources.
        options: how they become tokens.
        max_bad: broken images that are accepted.
        workers: processes that write shards, through Ray (pip install 'layton[scale]'), each with a GPU where there
            are any; 0 writes them in this one. The same bytes either way.
        cluster: address of a running Ray cluster for the workers; it must see sources and --out under the same paths.
        isolate: encode in a process of its own (each worker in one), so that an image that crashes it, or takes all
            memory, is found and passed over as a broken one; the model is in memory once more.
        json: write figures to this file as well.
    """
    from generation.data.tokenizing import tokenize_dataset

    images.check()
    options.check()
    require_least(0, {"max_bad": max_bad, "workers": workers})
    if cluster is not None and not workers:
        raise UsageError("--cluster needs --workers, how many processes it should run")
    started = time.perf_counter()
    places, settled = absolute(sources, options)
    maker = partial(make_job, places, images, settled)
    job = maker(device="cpu") if workers or isolate else maker()  # others take the GPUs
    elsewhere: ShardRunner | None = None
    if workers:
        from generation.data.scaling import RayRunner

        elsewhere = RayRunner(maker, workers, cluster, isolate)
    elif isolate:
        from generation.data.isolation import IsolatedRunner

        elsewhere = IsolatedRunner(maker)
    with progress(len(job.source), "tokenize") as bar:
        report = tokenize_dataset(job, out, on_progress=bar.update, elsewhere=elsewhere)
    seconds = time.perf_counter() - started
    rate = "" if report.reused == report.shards else f", {report.samples / seconds:.1f} images/s"
    sys.stdout.write(
        f"{out}: {report.samples} image{'s' * (report.samples != 1)} in {report.shards} "
        f"shard{'s' * (report.shards != 1)} ({report.reused} were there), "
        f"{len(report.skipped)} passed over{rate}\n"
    )
    _tell_faults(report, max_bad)
    if json is not None:
        write_json(json, {**asdict(report), "seconds": seconds, "header": asdict(job.header())})
    return int(len(report.skipped) > max_bad)


def _tell_faults(report: TokenizeReport, max_bad: int) -> None:
    for reason in report.skipped[:_NAMED]:
        sys.stderr.write(f"layton: passed over {reason}\n")
    if len(report.skipped) > _NAMED:
        sys.stderr.write(f"layton: and {len(report.skipped) - _NAMED} more; the manifest names all of them\n")
    if len(report.skipped) > max_bad:
        sys.stderr.write(f"layton: {len(report.skipped)} passed over where --max-bad allows {max_bad}: exit status 1\n")
    if report.uncaptioned:
        sys.stderr.write(f"layton: {report.uncaptioned} images have no caption\n")
    if report.cut_captions:
        sys.stderr.write(f"layton: {report.cut_captions} captions were longer than the text encoder reads\n")
