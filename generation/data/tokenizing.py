"""A data set becomes token shards: resumable shard by shard, every input encoded or passed over by name."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from generation.data.token_shards import (
    FORMAT,
    MANIFEST_NAME,
    PLAN_NAME,
    Precision,
    TokenHeader,
    TokenShard,
    read_json,
    read_shard,
    sha256_of,
    shard_name,
    write_manifest,
    write_shard,
    write_sorted_json,
)
from generation.text.encoders import TextEncoder
from layton.data.cache import differences
from layton.data.geometry import FitPolicy, fit_image
from layton.data.images import ImageError, to_tensor
from layton.data.sources import ImageSource, StoredSource
from layton.data.threads import batched, in_threads
from layton.data.types import ImageSample
from layton.lock import lock_folder
from layton.modules import weights_digest
from layton.tokenizer import LaytonTokenizer

Progress = Callable[[int], object]
JobMaker = Callable[[], "TokenizeJob"]
ShardRunner = Callable[[Path, Sequence[int]], "Iterator[ShardResult]"]


_OF_IMAGES = {"inputs", "content"}  # of a plan: what the images alone decide


@dataclass(frozen=True, slots=True)
class TokenizeReport:
    """What came of it; ``inputs = samples + len(skipped)``.

    Attributes:
        inputs: Images of the source, broken and missing ones included.
        samples: Images that are in the shards.
        skipped: "key: reason" of those that are not.
        shards: Number of shards.
        reused: Shards that were there already.
        cut_captions: Captions longer than the text encoder reads, of the shards that were written now.
        uncaptioned: Images without a caption.
    """

    inputs: int
    samples: int
    skipped: tuple[str, ...]
    shards: int
    reused: int
    cut_captions: int
    uncaptioned: int


@dataclass(frozen=True, slots=True, eq=False)
class TokenizeJob:
    """What is to be done.

    Attributes:
        source: Images and captions.
        tokenizer: Makes the codes.
        name: Of the source, for people.
        policy: How stored images become square.
        shard_size: Inputs in a shard.
        batch_size: Images encoded at once.
        text_encoder: Its features are cached too; None caches none.
        seed: Of the choices that a source makes (wording of captions).
        precision: In which the encoder computes; bf16 is quicker on GPUs and changes about 3 % of the codes.
    """

    source: ImageSource
    tokenizer: LaytonTokenizer
    name: str
    policy: FitPolicy = "crop"
    shard_size: int = 4096
    batch_size: int = 16
    text_encoder: TextEncoder | None = None
    seed: int = 0
    precision: Precision = "fp32"

    def encode(self, images: Tensor) -> Tensor:
        """Codes (B, N) int64 of images (B, 3, S, S); distances to the codebook are taken in float32 either way."""
        kind = self.tokenizer.device.type
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            return self.tokenizer.encode(images)

    def header(self) -> TokenHeader:
        """What the shards say about themselves."""
        tokenizer, text = self.tokenizer, self.text_encoder
        return TokenHeader(
            fingerprint=tokenizer.fingerprint(),
            vocab_size=tokenizer.vocab_size,
            num_tokens=tokenizer.num_tokens,
            image_size=tokenizer.image_size,
            encoder=weights_digest(tokenizer.encoder),
            policy=self.policy,
            text_encoder="" if text is None else text.fingerprint(),
            text_length=0 if text is None else text.max_length,
            text_padding=str(getattr(text, "padding", "left")),
            precision=self.precision,
        )

    def plan(self) -> dict[str, Any]:
        """What decides every byte of the shards, as far as it can be told without reading every image."""
        count = len(self.source)
        return {
            "format": FORMAT,
            "header": asdict(self.header()),
            "source": self.name,
            "inputs": count,
            "content": self._content(),
            "shard_size": self.shard_size,
            "seed": self.seed,
        }

    def _content(self) -> str:
        if isinstance(self.source, StoredSource):
            return self.source.stamp()
        ends = [self.source.sample(index, seed=0)["key"] for index in (0, len(self.source) - 1)]
        return hashlib.sha256("\n".join(ends).encode("utf-8", "replace")).hexdigest()


@dataclass(frozen=True, slots=True)
class ShardResult:
    """One shard that is there.

    Attributes:
        number: Of the shard.
        samples: Images in it.
        skipped: "key: reason" of those that are not.
        sha256: Of its file.
        reused: Whether it was there already.
        cut_captions: Captions longer than the text encoder reads, if it was written now.
        uncaptioned: Images without a caption.
    """

    number: int
    samples: int
    skipped: tuple[str, ...]
    sha256: str
    reused: bool
    cut_captions: int
    uncaptioned: int

    @property
    def inputs(self) -> int:
        """Images that it was made of."""
        return self.samples + len(self.skipped)


class ShardWriter:
    """Writes any shard of a job, in any order and process: each is made of its own inputs and appears when it is whole.

    Args:
        job: What is to be done.
        out: Folder of the dataset.
    """

    def __init__(self, job: TokenizeJob, out: Path) -> None:
        self.job, self.out, self.header = job, out, job.header()
        self._written = _hashes(out)

    def __call__(
        self,
        number: int,
        *,
        on_progress: Progress | None = None,
        on_begin: Progress | None = None,
        passed_over: Mapping[int, str] | None = None,
    ) -> ShardResult:
        """Write shard ``number``, unless it is there.

        Args:
            number: Of the shard.
            on_progress: Told how many inputs are done with, several at a time.
            on_begin: Told which input is begun with, in any thread.
            passed_over: Inputs that are not touched, and why.
        """
        job = self.job
        start = number * job.shard_size
        indices = range(start, min(start + job.shard_size, len(job.source)))
        path = self.out / shard_name(number)
        digest = sha256_of(path) if path.is_file() else ""
        whole = digest and self._written.get(path.name, digest) == digest
        shard = _finished(path, self.header, len(indices)) if whole else None
        reused, cut = shard is not None, 0
        if shard is None:
            shard, cut = _make(job, indices, _Loader(job, on_begin, passed_over or {}), on_progress)
            write_shard(path, self.header, shard)
            digest = sha256_of(path)
        bare = sum(not caption for caption in shard.captions)
        return ShardResult(number, len(shard), tuple(shard.skipped), digest, reused, cut, bare)

    def try_alone(self, index: int | None) -> None:
        """Read and encode one input, or a blank image, and keep nothing of it: to find the one that fails."""
        if index is None:
            side = self.job.tokenizer.image_size
            self.job.encode(torch.zeros(1, 3, side, side))
            return
        item = _Loader(self.job)(index)
        if not isinstance(item, ImageError):
            self.job.encode(item.sample["image"][None])


def tokenize_dataset(
    job: TokenizeJob, out: Path, *, on_progress: Progress | None = None, elsewhere: ShardRunner | None = None
) -> TokenizeReport:
    """Write a token dataset, or the shards of it that are not there yet.

    Killed at any time and started again it gives the same bytes as one clean run; at most one shard (for each worker)
    is done twice.

    Args:
        job: What is to be done.
        out: Folder to write.
        on_progress: Told how many inputs are done with, several at a time.
        elsewhere: Has other processes write the shards (`generation.data.scaling.RayRunner`); None writes them here.

    Raises:
        ValueError: If the folder holds a dataset made by something else; the message names what differs.
        FolderInUseError: If another process writes there.
    """
    if job.shard_size < 1 or job.batch_size < 1:
        raise ValueError(f"shard_size and batch_size must be >= 1, got {job.shard_size} and {job.batch_size}")
    plan = job.plan()
    with lock_folder(out):
        _check_plan(out, plan)
        for orphan in out.glob(".*.part"):  # of a process that was killed while it wrote
            orphan.unlink()
        numbers = range(-(-len(job.source) // job.shard_size))
        found: list[ShardResult] = []
        if elsewhere is None:
            write = ShardWriter(job, out)
            for number in numbers:
                found.append(write(number, on_progress=on_progress))
                if found[-1].reused and on_progress is not None:
                    on_progress(found[-1].inputs)
        else:
            for result in elsewhere(out, numbers):
                found.append(result)
                if on_progress is not None:
                    on_progress(result.inputs)
        return _finish(out, plan, sorted(found, key=lambda each: each.number), _missing(job.source))


def _finish(out: Path, plan: dict[str, Any], found: Sequence[ShardResult], missing: list[str]) -> TokenizeReport:
    """Write the manifest of all shards, in order."""
    skipped = missing + [reason for result in found for reason in result.skipped]
    entries = [
        {
            "file": shard_name(result.number),
            "samples": result.samples,
            "skipped": len(result.skipped),
            "sha256": result.sha256,
        }
        for result in found
    ]
    samples = sum(result.samples for result in found)
    counts = {"inputs": samples + len(skipped), "samples": samples, "skipped": len(skipped)}
    write_manifest(out, {**plan, "shards": entries, "counts": counts, "skipped": skipped})
    return TokenizeReport(
        counts["inputs"],
        samples,
        tuple(skipped),
        len(entries),
        sum(result.reused for result in found),
        sum(result.cut_captions for result in found),
        sum(result.uncaptioned for result in found),
    )


def _check_plan(out: Path, plan: dict[str, Any]) -> None:
    path = out / PLAN_NAME
    if not path.exists():
        others = next((file.name for file in out.iterdir() if not file.name.startswith(".")), None)
        if others is not None:
            raise ValueError(f"{out} holds other files ({others}): token shards need a folder of their own")
        write_sorted_json(path, plan)
        return
    stored = read_json(path)
    differs = differences(_flat(stored), _flat(plan))
    if differs and stored.keys() == plan.keys() and all(stored[k] == plan[k] for k in plan.keys() - _OF_IMAGES):
        raise ValueError(
            f"{out} was begun with other images ({stored['inputs']}, now {plan['inputs']}, or changed ones): take "
            "another folder, or give the new ones alone and keep two"
        )
    if differs:
        raise ValueError(f"{out} was begun with something else ({differs}); take another folder")


def _flat(plan: dict[str, Any]) -> dict[str, Any]:
    """A plan with the fields of its header beside the others, so that a difference names the field."""
    older = {"precision": "fp32"}  # of plans that do not say it
    return {name: value for name, value in plan.items() if name != "header"} | older | dict(plan["header"])


def _missing(source: ImageSource) -> list[str]:
    """Images that a source knew to be missing when it was opened."""
    return list(source.bad.reasons) if isinstance(source, StoredSource) else []


def _hashes(out: Path) -> dict[str, str]:
    """Hashes of the shards of a finished run, by file name; none where there is no manifest that can be read."""
    try:
        return {str(entry["file"]): str(entry["sha256"]) for entry in read_json(out / MANIFEST_NAME)["shards"]}
    except (ValueError, KeyError, TypeError):
        return {}


def _finished(path: Path, header: TokenHeader, inputs: int) -> TokenShard | None:
    """A shard that is there, without its text features; a damaged one is made again."""
    try:
        found, shard = read_shard(path, with_text=False)
    except ValueError:
        return None
    return shard if found == header and len(shard) + len(shard.skipped) == inputs else None


def _make(
    job: TokenizeJob, indices: Sequence[int], load: _Loader, on_progress: Progress | None
) -> tuple[TokenShard, int]:
    codes: list[Tensor] = []
    sizes: list[tuple[int, int]] = []
    keys: list[str] = []
    captions: list[str] = []
    skipped: list[str] = []
    threads = min(8, os.cpu_count() or 1)
    for batch in batched(in_threads(load, indices, num_threads=threads), job.batch_size):
        good = [item for item in batch if not isinstance(item, ImageError)]
        skipped += [str(item) for item in batch if isinstance(item, ImageError)]
        if good:
            codes.append(job.encode(torch.stack([item.sample["image"] for item in good])).cpu())
            sizes += [item.size for item in good]
            keys += [item.sample["key"] for item in good]
            captions += [item.sample["caption"] for item in good]
        if on_progress is not None:
            on_progress(len(batch))
    stacked = torch.cat(codes) if codes else torch.zeros(0, job.tokenizer.num_tokens, dtype=torch.int64)
    before = torch.tensor(sizes, dtype=torch.int32).reshape(-1, 2)
    if job.text_encoder is None:
        return TokenShard(stacked, keys, captions, skipped, sizes=before), 0
    text, ends, cut = _encode_captions(job.text_encoder, captions, job.batch_size)
    return TokenShard(stacked, keys, captions, skipped, text, ends, before), cut


@dataclass(frozen=True, slots=True, eq=False)
class _Square:
    sample: ImageSample
    size: tuple[int, int]  # before it became square


@dataclass(frozen=True, slots=True)
class _Loader:
    """Reads inputs of a job."""

    job: TokenizeJob
    on_begin: Progress | None = None
    passed_over: Mapping[int, str] = field(default_factory=dict)

    def __call__(self, index: int) -> _Square | ImageError:
        source = self.job.source
        if index in self.passed_over:
            name = source.keys[index] if isinstance(source, StoredSource) else f"input {index}"
            return ImageError(f"{name}: {self.passed_over[index]}")
        if self.on_begin is not None:
            self.on_begin(index)
        if not isinstance(source, StoredSource):
            sample = source.sample(index, seed=self.job.seed)
            return _Square(sample, (sample["image"].shape[-2], sample["image"].shape[-1]))
        try:
            stored = source.load(index)
        except ImageError as error:
            return error
        square, geometry = fit_image(stored.image, self.job.tokenizer.image_size, policy=self.job.policy)
        sample = ImageSample(image=to_tensor(square), caption=stored.caption, key=stored.key)
        return _Square(sample, geometry.original_size)


@torch.no_grad()
def _encode_captions(encoder: TextEncoder, captions: Sequence[str], batch_size: int) -> tuple[Tensor, Tensor, int]:
    """Features of all captions without padding (rows, D), where each ends (n,), and how many were cut."""
    rows: list[Tensor] = [torch.zeros(0, encoder.width, dtype=torch.float16)]
    lengths: list[Tensor] = [torch.zeros(0, dtype=torch.int64)]
    cut = 0
    for batch in batched(captions, batch_size):
        result = encoder.encode(batch)
        half = result.features[result.mask].half().cpu()
        if not bool(torch.isfinite(half).all()):
            raise ValueError(
                f"the text encoder {encoder.name} gives features that are not finite in half precision, in which "
                f"shards keep them, of captions such as {batch[0][:60]!r}: leave text_encoder out here"
            )
        rows.append(half)
        lengths.append(result.mask.sum(1).cpu())
        cut += len(result.cut)
    return torch.cat(rows), torch.cat(lengths).cumsum(0), cut
