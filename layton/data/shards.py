"""Tar shards in the webdataset layout (jpg, png or webp; txt; json), read at random places instead of as a stream.

Random access makes order and resume exact; webdataset's own streaming reader passes over cut-off shards in silence.
"""

from __future__ import annotations

import bisect
import glob
import hashlib
import json
import os
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
from webdataset.shardlists import expand_urls

from layton.data.images import DEFAULT_LIMITS, ImageError, ImageLimits, load_image
from layton.data.shard_indexes import index_shards
from layton.data.sources import StoredImage, StoredSource
from layton.data.tar import Captions, ShardError, ShardIndex, Span
from layton.data.texts import LazyTexts, clean_text, key_digests
from layton.data.transforms import SampleTransform
from layton.data.types import Split, check_split, split_of_key, told_split

_MAX_OPEN_SHARDS = 64
_MAX_CAPTION_BYTES = 2**20
_STAMPED, _STAMP_BYTES = 64, 2**12  # places of a shard that a stamp looks at, and how far
_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*:")


class ShardSource(StoredSource):
    """Captioned images from tar shards; keys are "shard/key".

    Args:
        shards: Paths or glob patterns of plain, local tar files. Matches are sorted.
        split: Keep only this split (`split_of_key`); None for all.
        transform: Makes tensors of equal size; a centre crop to 256 pixels by default.
        captions: Whether a sample with neither .txt nor .json is an error.
        repeated_keys: Accept a key that occurs in several shards (keys are then unique by their shard only).
        max_bad: How many different broken or missing images are tolerated; None for any number.
        limits: What is refused from an image's header.

    Raises:
        ShardError: If a shard is damaged or ambiguous; see `layton.data.tar.index_shard`.
        ValueError: If no file matches, a pattern is a URL, or the split is empty.
    """

    def __init__(
        self,
        shards: list[str] | str,
        *,
        split: Split | None = "train",
        transform: SampleTransform | None = None,
        captions: Captions = "required",
        repeated_keys: bool = False,
        max_bad: int | None = 100,
        limits: ImageLimits | None = None,
    ) -> None:
        super().__init__(transform=transform, max_bad=max_bad)
        self.paths = expand_shards(shards)
        self.split = check_split(split)
        self.limits = limits or DEFAULT_LIMITS
        self.indexes = index_shards(self.paths, captions=captions)
        if not repeated_keys:
            _check_unique(self.indexes)
        self.ignored = sum((index.ignored for index in self.indexes), Counter[str]())
        self._keys = _ShardKeys(self.indexes, self._wanted, _told_apart(self.paths) if repeated_keys else None)
        if not len(self._keys):
            raise ValueError(f"{told_split(split)}{len(self.paths)} shards ({self.paths[0]}, ...) holds no images")
        for index in self.indexes:
            missing = [key for key in index.missing if self._wanted(key)]
            self.bad.record_all(f"{index.path.stem}/{key}: a caption without an image" for key in missing)
        self._files = _OpenShards()

    @property
    def keys(self) -> Sequence[str]:
        """Unique keys "shard/key" of all samples, in the order of shards and members."""
        return self._keys

    def stamp(self) -> str:
        """See `StoredSource.stamp`; of every shard the size, and some of its bytes."""
        found = hashlib.sha256()
        for number, key in enumerate(self._keys):
            found.update(("\n" * (number > 0) + key).encode("utf-8", "replace"))
        for path in self.paths:
            for piece in sampled_bytes(path):
                found.update(piece)
        return found.hexdigest()

    def load(self, index: int) -> StoredImage:
        """Read and decode one image; see `StoredSource.load`.

        Raises:
            ImageError: If the image or its caption is broken.
            ShardError: If the shard changed since it was indexed.
        """
        shard, row = self._locate(index)
        key = self._keys[index]
        span = shard.image(row)
        if span.size > self.limits.max_bytes:
            raise ImageError(f"{key}: {span.size} bytes, more than the {self.limits.max_bytes} allowed")
        image = load_image(self._files.read(shard, span), name=key, limits=self.limits)
        return StoredImage(image, self._caption(shard, row, key), key)

    def told(self, index: int) -> str:
        """See `StoredSource.told`."""
        shard, row = self._locate(index)
        return self._caption(shard, row, self._keys[index])

    def read_bytes(self, index: int) -> bytes:
        """The image file of a sample as it is stored.

        Args:
            index: In [0, len).
        """
        shard, row = self._locate(index)
        return self._files.read(shard, shard.image(row))

    def _locate(self, index: int) -> tuple[ShardIndex, int]:
        number, row = self._keys.locate(index)
        return self.indexes[number], row

    def _wanted(self, key: str) -> bool:
        return self.split is None or split_of_key(key) == self.split

    def _caption(self, shard: ShardIndex, row: int, key: str) -> str:
        text, metadata = shard.text(row), shard.json(row)
        span = text or metadata
        if span is None:
            return ""
        if span.size > _MAX_CAPTION_BYTES:
            raise ImageError(f"{key}: caption of {span.size} bytes, more than the {_MAX_CAPTION_BYTES} allowed")
        try:
            content = self._files.read(shard, span).decode("utf-8-sig")
            return content.strip() if text else caption_of(json.loads(content))
        except (ValueError, RecursionError) as error:
            raise ImageError(f"{key}: unreadable caption ({error})") from error


def caption_of(metadata: object) -> str:
    """The caption in a sample's JSON: "caption", else "text", else empty.

    Args:
        metadata: Parsed JSON.
    """
    if isinstance(metadata, dict):
        for name in ("caption", "text"):
            if isinstance(metadata.get(name), str):
                return clean_text(metadata[name])
    return ""


def sampled_bytes(path: Path) -> Iterator[bytes]:
    """Size and some bytes of a file, for a stamp that tells it from another."""
    size = path.stat().st_size
    yield f"\n{size}\n".encode()
    with path.open("rb") as file:
        for place in range(0, size, max(_STAMP_BYTES, size // _STAMPED)):
            file.seek(place)
            yield file.read(_STAMP_BYTES)


def expand_shards(shards: list[str] | str) -> list[Path]:
    """Files behind paths and patterns, sorted, each once.

    Args:
        shards: Local paths or patterns, of a shell (``*``, ``**``) or with webdataset's ranges (``{0000..0099}``).
            URLs are refused: "pipe:" and its kin run commands.

    Raises:
        ValueError: If a pattern is a URL, or nothing matches it.
    """
    patterns = [shards] if isinstance(shards, str) else list(shards)
    paths: set[Path] = set()
    for pattern in patterns:
        if _SCHEME.match(pattern):
            raise ValueError(f"shards must be local files, got {pattern!r}")
        for part in [pattern] if os.path.exists(pattern) else expand_urls(pattern):
            matches = [part] if os.path.exists(part) else glob.glob(part, recursive=True)
            if not matches:
                plain = part == pattern and not glob.has_magic(part)
                raise ValueError(f"{part}: no such file or folder" if plain else f"no shard matches {part!r}")
            paths.update(Path(match) for match in matches)
    if not paths:
        raise ValueError("no shards were given")
    return sorted(paths)


def absolute_pattern(pattern: str) -> str:
    """A path or pattern as processes with another working folder find it; a URL stays, to be refused as one."""
    return pattern if _SCHEME.match(pattern) else os.path.abspath(pattern)


class _ShardKeys(LazyTexts):
    """Keys "shard/key" of the wanted samples, put together when they are asked for: a row number is all each takes."""

    def __init__(
        self, indexes: Sequence[ShardIndex], wanted: Callable[[str], bool], names: Sequence[str] | None = None
    ) -> None:
        self._indexes = indexes
        self._names = names if names is not None else [index.path.stem for index in indexes]
        self._rows = [
            np.fromiter((row for row, key in enumerate(index.keys) if wanted(key)), dtype=np.int32) for index in indexes
        ]
        self._ends = list(accumulate(len(rows) for rows in self._rows))

    def __len__(self) -> int:
        """How many."""
        return self._ends[-1]

    def at(self, place: int) -> str:
        """See `LazyTexts.at`."""
        number, row = self.locate(place)
        return f"{self._names[number]}/{self._indexes[number].keys[row]}"

    def locate(self, index: int) -> tuple[int, int]:
        """Number of the shard, and the sample's row in it; the index is in [0, len)."""
        number = bisect.bisect_right(self._ends, index)
        start = self._ends[number - 1] if number else 0
        return number, int(self._rows[number][index - start])


def _told_apart(paths: Sequence[Path]) -> list[str]:
    """Names of shards of which keys may repeat: stems, with as many folders before them as tell all apart."""
    deepest = max(len(path.parts) for path in paths)
    for depth in range(1, deepest + 1):
        names = ["/".join([*path.parts[-depth:-1], path.stem]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise ShardError(f"shards differ in their endings alone, and repeat keys: {paths[0]}, ...")


def _check_unique(indexes: list[ShardIndex]) -> None:
    """No key in two shards. Digests of 8 bytes are compared; keys of equal digests are then looked at themselves."""
    digests = np.concatenate([key_digests(index.keys) for index in indexes])
    alike, counts = np.unique(digests, return_counts=True)
    suspects = set(alike[counts > 1].tolist())
    owner: dict[str, Path] = {}
    for index in indexes if suspects else ():
        for row in np.flatnonzero(np.isin(key_digests(index.keys), list(suspects))).tolist():
            key = index.keys[row]
            if key in owner:
                told = f"key {key!r} is in both {owner[key]} and {index.path}"
                raise ShardError(f"{told} (repeated_keys, or --repeated-keys, accepts that)")
            owner[key] = index.path


class _OpenFile:
    """A descriptor that lives as long as somebody reads with it."""

    def __init__(self, path: Path) -> None:
        self._close = os.close  # at the interpreter's end the module may be gone
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            self._close(self.descriptor)


class _OpenShards:
    """At most 64 open shards; reads by position, so that threads and forked workers may share the files."""

    def __init__(self) -> None:
        self._files: OrderedDict[Path, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[_OpenShards], tuple[()]]:
        """Another process opens its own."""
        return _OpenShards, ()

    def read(self, shard: ShardIndex, span: Span) -> bytes:
        file = self._open(shard)  # held: another thread may push it out meanwhile
        content = os.pread(file.descriptor, span.size, span.offset)
        while len(content) < span.size:  # one call reads at most 2 GiB
            more = os.pread(file.descriptor, span.size - len(content), span.offset + len(content))
            if not more:
                raise ShardError(
                    f"{shard.path}: ended at {span.offset + len(content)}, shorter than when it was indexed"
                )
            content += more
        return content

    def _open(self, shard: ShardIndex) -> _OpenFile:
        with self._lock:
            if shard.path in self._files:
                self._files.move_to_end(shard.path)
                return self._files[shard.path]
            if len(self._files) >= _MAX_OPEN_SHARDS:
                self._files.popitem(last=False)
            try:
                file = _OpenFile(shard.path)
            except OSError as error:
                raise ShardError(f"{shard.path}: cannot be read ({error.strerror})") from error
            status = os.fstat(file.descriptor)
            if (status.st_size, status.st_mtime_ns) != shard.stamp:
                raise ShardError(f"{shard.path}: changed since it was indexed")
            self._files[shard.path] = file
            return file
