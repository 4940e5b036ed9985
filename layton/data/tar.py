"""Index of a tar shard: where each sample's members lie, from one strict pass over the headers.

Nothing is ever extracted, unpickled or run. What lenient readers pass over in silence is an error here: a shard cut
off anywhere before its end-of-archive mark, a key that comes back after another one, two members of one kind.
"""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from layton.data.texts import PackedTexts

Captions = Literal["required", "optional"]

_BLOCK = 512
_END_OF_ARCHIVE = 2 * _BLOCK  # two blocks of zeros (POSIX.1-2001, pax interchange format)
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_IMAGE, _TEXT, _JSON = 0, 1, 2
_KIND = {"jpg": _IMAGE, "jpeg": _IMAGE, "png": _IMAGE, "webp": _IMAGE, "txt": _TEXT, "json": _JSON}
_NAMED = 4  # kinds of members in a message
_ABSENT = -1
_MAX_NAME_BYTES = 255


class ShardError(ValueError):
    """A shard is damaged or ambiguous; the message is one line that names the shard and where."""


@dataclass(frozen=True, slots=True)
class Span:
    """Where the bytes of one member lie in its shard.

    Attributes:
        offset: First byte.
        size: Number of bytes.
    """

    offset: int
    size: int


@dataclass(frozen=True, slots=True, eq=False)
class ShardIndex:
    """What a shard holds.

    Attributes:
        path: The shard.
        stamp: Size in bytes and time of modification in ns when it was indexed.
        keys: Keys of the samples that have an image, in the order of the shard; packed, as there may be millions.
        spans: (n, 3, 2) int64, offset and size of image, text and JSON; offset -1 where there is none.
        missing: Keys with a caption but no image.
        ignored: How many members were passed over, by reason.
    """

    path: Path
    stamp: tuple[int, int]
    keys: PackedTexts
    spans: NDArray[np.int64]
    missing: list[str]
    ignored: Counter[str]

    def image(self, row: int) -> Span:
        """Where the image of a sample lies.

        Args:
            row: Place in `keys`.
        """
        offset, size = self.spans[row, _IMAGE].tolist()
        return Span(offset, size)

    def text(self, row: int) -> Span | None:
        """Where the caption file of a sample lies, if it has one.

        Args:
            row: Place in `keys`.
        """
        return self._optional(row, _TEXT)

    def json(self, row: int) -> Span | None:
        """Where the JSON file of a sample lies, if it has one.

        Args:
            row: Place in `keys`.
        """
        return self._optional(row, _JSON)

    def _optional(self, row: int, kind: int) -> Span | None:
        offset, size = self.spans[row, kind].tolist()
        return None if offset == _ABSENT else Span(offset, size)


@dataclass(slots=True)
class _Builder:
    """Samples found so far, and the one being read."""

    name: str
    captions: Captions
    keys: list[str] = field(default_factory=list)
    rows: list[list[tuple[int, int]]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    halves: list[str] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    current: str | None = None
    members: dict[int, tuple[str, int, int]] = field(default_factory=dict)

    def add(self, key: str, kind: int, member: tarfile.TarInfo) -> None:
        if key != self.current:
            if key in self.seen:
                raise ShardError(
                    f"{self.name}: key {key!r} comes back at {member.name!r} (offset {member.offset}) "
                    f"after {self.current!r}: duplicate or interleaved samples"
                )
            self.finish()
            self.current = key
            self.seen.add(key)
        elif kind in self.members:
            first = self.members[kind][0]
            raise ShardError(
                f"{self.name}: key {key!r} has both {first!r} and {member.name!r} (offset {member.offset})"
            )
        self.members[kind] = (member.name, member.offset_data, member.size)

    def finish(self) -> None:
        """Close the current sample."""
        key, members = self.current, self.members
        if key is None:
            return
        self.members = {}
        if _IMAGE not in members:
            self.missing.append(key)
            return
        if self.captions == "required" and _TEXT not in members and _JSON not in members:
            self.halves.append(key)  # reported at the end: its caption may yet come, and then the fault is another
        self.keys.append(key)
        self.rows.append([members[kind][1:] if kind in members else (_ABSENT, 0) for kind in (_IMAGE, _TEXT, _JSON)])

    def close(self, ignored: Counter[str]) -> None:
        """Close the last sample, and see whether the shard held any and all were whole."""
        self.finish()
        if self.halves:
            raise ShardError(
                f"{self.name}: half a sample: key {self.halves[0]!r} has an image but neither .txt nor .json "
                f"({len(self.halves)} such; captions='optional' accepts them)"
            )
        if not self.keys and not self.missing:
            others = ", ".join(f"{count} {kind}" for kind, count in ignored.most_common(_NAMED))
            raise ShardError(f"{self.name}: holds no samples" + (f" (passed over: {others})" if others else ""))


def index_shard(path: Path, *, captions: Captions = "required") -> ShardIndex:
    """Read the headers of a tar shard once.

    Args:
        path: Local, uncompressed tar file.
        captions: Whether a sample without .txt and .json is an error.

    Raises:
        ShardError: If the shard cannot be read, is empty, compressed, cut off, holds interleaved, duplicate or half
            samples, or member names that leave the archive.
    """
    name = str(path)
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            _check_kind(name, status.st_size, file.read(8))
            file.seek(0)
            builder, ignored = _Builder(name, captions), Counter[str]()
            for member in _members(file, name, status.st_size):
                _classify(member, builder, ignored)
            builder.close(ignored)
    except OSError as error:
        raise ShardError(f"{name}: cannot be read ({error.strerror or error})") from error
    spans = np.array(builder.rows, dtype=np.int64).reshape(-1, 3, 2)
    stamp = (status.st_size, status.st_mtime_ns)
    return ShardIndex(path, stamp, PackedTexts(builder.keys), spans, builder.missing, ignored)


def _check_kind(name: str, size: int, head: bytes) -> None:
    if size == 0:
        raise ShardError(f"{name}: the file is empty (0 bytes)")
    if head.startswith(_COMPRESSED):
        raise ShardError(f"{name}: compressed; shards must be plain tar files for random access")
    if size % _BLOCK:
        raise ShardError(f"{name}: cut off, or no tar file: {size} bytes is no multiple of {_BLOCK}")


def _members(file: object, name: str, size: int) -> Iterator[tarfile.TarInfo]:
    """Yield all headers, then make sure that the archive ends where it says."""
    last, end = "none", 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:  # type: ignore[call-overload]
            while (member := tar.next()) is not None:
                tar.members = []  # tarfile keeps every header otherwise
                if member.size < 0 or member.offset_data < end or member.offset_data + member.size > size:
                    raise ShardError(
                        f"{name}: cut off inside {member.name!r} at offset {member.offset} of {size}; "
                        f"last good member {last!r}"
                    )
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                yield member
                last = member.name
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(_END_OF_ARCHIVE) != bytes(_END_OF_ARCHIVE):
                raise ShardError(
                    f"{name}: cut off or damaged at offset {tar.offset} of {size}: no end-of-archive mark; "
                    f"last good member {last!r}"
                )
    except (tarfile.TarError, EOFError, OverflowError, RecursionError, UnicodeError) as error:
        raise ShardError(f"{name}: cut off or damaged after member {last!r} ({error})") from error


def _classify(member: tarfile.TarInfo, builder: _Builder, ignored: Counter[str]) -> None:
    if not member.isreg() or member.issparse():
        ignored["not a regular file"] += 1
        return
    _check_name(member, builder.name)
    path = PurePosixPath(member.name)
    stem, _, extension = path.name.partition(".")
    kind = _KIND.get(extension.lower())
    if kind is None or not stem:
        ignored[f".{extension.lower()}"] += 1
        return
    builder.add(str(path.with_name(stem)), kind, member)


def _check_name(member: tarfile.TarInfo, shard: str) -> None:
    """Refuse names that could leave a folder if a later tool used the key as a file name."""
    name = member.name
    hostile = (
        name.startswith(("/", "\\"))
        or ".." in PurePosixPath(name.replace("\\", "/")).parts
        or not name.isprintable()
        or (len(name) > 1 and name[1] == ":")
        or len(name.encode("utf-8", "surrogateescape")) > _MAX_NAME_BYTES
    )
    if hostile:
        raise ShardError(f"{shard}: refused member name {name[:80]!r} at offset {member.offset}")
