"""Folders of image files, with captions beside them or in one JSON-lines file."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from layton.data.images import (
    DEFAULT_LIMITS,
    SUFFIXES,
    UNREAD_SUFFIXES,
    ImageError,
    ImageLimits,
    load_image,
    tell_unread,
)
from layton.data.shards import caption_of
from layton.data.sources import StoredImage, StoredSource
from layton.data.texts import LazyTexts, PackedTexts, Places, repeated
from layton.data.transforms import SampleTransform
from layton.data.types import Split, check_split, split_of_key, told_split

_CAPTION_FILES = ("captions.jsonl", "metadata.jsonl")
_MAX_CAPTION_BYTES = 2**20
_STAMPED, _STAMP_BYTES = 256, 2**12  # files that a stamp looks into, and how far


class ImageFolderSource(StoredSource):
    """Captioned images from a folder and the folders in it; keys are "folder/path without suffix".

    A caption comes from `captions.jsonl` or `metadata.jsonl` at the top (one {"file_name": ..., "caption" or "text":
    ...} a line, the layout of Hugging Face's imagefolder), else from a .txt file beside the image, else it is empty.
    With ``classes`` it is the name of the folder at the top in which the image lies, as ImageNet's are.

    Args:
        folder: Where the images are.
        split: Keep only this split (`split_of_key` of the file's stem); None for all.
        classes: Whether folders at the top are classes, and their names the captions.
        transform: Makes tensors of equal size; a centre crop to 256 pixels by default.
        max_bad: How many different broken or missing images are tolerated; None for any number.
        limits: What is refused from an image's header.

    Raises:
        ValueError: If the folder is missing, holds no image of the split, two images share a key, or the captions
            file is malformed, or an image belongs to no class.
    """

    def __init__(
        self,
        folder: str,
        *,
        split: Split | None = "train",
        classes: bool = False,
        transform: SampleTransform | None = None,
        max_bad: int | None = 100,
        limits: ImageLimits | None = None,
    ) -> None:
        super().__init__(transform=transform, max_bad=max_bad)
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"{folder}: not a folder")
        self.split = check_split(split)
        self.limits = limits or DEFAULT_LIMITS
        self.classes = classes
        unread = Counter[str]()
        self._files = PackedTexts(_images(self.folder, unread))
        tell_unread(self.folder, unread)
        if classes:
            _require_classes(self.folder, self._files)
        self._listed = None if classes else _read_captions(self.folder, self._files)
        for name in sorted(self._listed.orphans) if self._listed else ():
            self.bad.record(f"{name}: a caption without an image")
        self._keys = _FileKeys(self.folder.resolve().name, self._files, self.split)
        if not len(self._keys):
            raise ValueError(f"{told_split(split)}{folder} holds no images")
        _require_unique(self._keys)

    @property
    def keys(self) -> Sequence[str]:
        """Unique keys "folder/path without suffix", sorted by path."""
        return self._keys

    def stamp(self) -> str:
        """See `StoredSource.stamp`; all names and listed captions, of some files the size and how they begin."""
        found = hashlib.sha256(b"classes" if self.classes else b"")
        looked_into = max(1, len(self._keys) // _STAMPED)
        for index, key in enumerate(self._keys):
            row = self._keys.row(index)
            listed = self._listed.at(row) if self._listed else None
            found.update(f"\n{key} {json.dumps(listed)}".encode("utf-8", "surrogatepass"))
            if index % looked_into == 0:
                image = self.folder / self._files.at(row)
                for file in (image, _beside(image)):
                    found.update(_beginning(file))
        return found.hexdigest()

    def load(self, index: int) -> StoredImage:
        """Read and decode one image; see `StoredSource.load`."""
        row = self._keys.row(index)
        image = load_image(self.folder / self._files.at(row), limits=self.limits)
        return StoredImage(image, self._caption(row), self._keys.at(index))

    def told(self, index: int) -> str:
        """See `StoredSource.told`."""
        return self._caption(self._keys.row(index))

    def _caption(self, row: int) -> str:
        name = self._files.at(row)
        if self.classes:
            return name.split("/", 1)[0]
        listed = self._listed.at(row) if self._listed else None
        if listed is not None:
            return listed
        image = self.folder / name
        text = _beside(image)
        try:
            status = text.stat()
            if not stat.S_ISREG(status.st_mode):
                raise ImageError(f"{text}: no regular file")
            if status.st_size > _MAX_CAPTION_BYTES:
                raise ImageError(f"{image}: caption of more than {_MAX_CAPTION_BYTES} bytes")
            return text.read_text(encoding="utf-8-sig").strip()
        except FileNotFoundError:
            return ""
        except (OSError, UnicodeDecodeError) as error:
            raise ImageError(f"{image}: unreadable caption ({error})") from error


def holds_images(folder: Path) -> bool:
    """Whether there is an image file in a folder or the folders in it."""
    return next(_images(folder), None) is not None


def _images(folder: Path, unread: Counter[str] | None = None) -> Iterator[str]:
    """Image files below a folder, by paths relative to it, sorted part by part; links to folders are not followed.

    Those of other kinds are counted by their suffix.
    """
    unread = Counter[str]() if unread is None else unread
    inside = [iter(_entries(folder, "", unread))]
    while inside:
        path = next(inside[-1], None)
        if path is None:
            inside.pop()
        elif path.endswith("/"):
            inside.append(iter(_entries(folder, path, unread)))
        else:
            yield path


def _entries(folder: Path, inside: str, unread: Counter[str]) -> list[str]:
    """Sorted image files, and folders ("name/"), directly in one of the folders.

    Raises:
        ValueError: It cannot be read, so that nobody would know what is missing.
    """
    found = []
    try:
        with os.scandir(folder / inside) as entries:
            for entry in entries:
                if _is_folder(entry):
                    if not entry.is_symlink():
                        found.append(f"{inside}{entry.name}/")
                    continue
                suffix = os.path.splitext(entry.name)[1].lower()
                if suffix in SUFFIXES:
                    found.append(inside + entry.name)
                elif suffix in UNREAD_SUFFIXES:
                    unread[suffix] += 1
    except PermissionError:
        if not inside:
            raise
        warnings.warn(f"{folder / inside} may not be read, and is passed over", stacklevel=2)
        return []
    except OSError as error:
        raise ValueError(f"{folder / inside} cannot be read ({error.strerror or error})") from error
    return sorted(found, key=lambda path: path.removesuffix("/"))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


class _FileKeys(LazyTexts):
    """Keys of the files of a split, put together when they are asked for: a row number is all that each takes."""

    def __init__(self, folder_name: str, files: PackedTexts, split: Split | None) -> None:
        self._folder_name, self._files = folder_name, files
        wanted = (row for row, path in enumerate(files) if split is None or split_of_key(Path(path).stem) == split)
        self._rows = np.fromiter(wanted, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    def at(self, place: int) -> str:
        return f"{self._folder_name}/{os.path.splitext(self.file(place))[0]}"

    def row(self, place: int) -> int:
        """The place among all files."""
        return int(self._rows[place])

    def file(self, place: int) -> str:
        """The path relative to the folder."""
        return self._files.at(self.row(place))


def _require_unique(keys: _FileKeys) -> None:
    owner: dict[str, str] = {}
    for place in repeated(keys):
        key = keys.at(place)
        if key in owner:
            raise ValueError(f"{owner[key]} and {keys.file(place)} would share the key {key!r}")
        owner[key] = keys.file(place)


def _require_classes(folder: Path, files: Sequence[str]) -> None:
    for path in files:
        if "/" not in path:
            raise ValueError(f"{folder / path}: lies in no class's folder")


class _Listed:
    """Captions of some of the files, by their rows: their bytes and 16 more for every file."""

    def __init__(self, files: PackedTexts) -> None:
        self.orphans: dict[str, None] = {}
        self._content = bytearray()
        self._spans = np.full((len(files), 2), -1, dtype=np.int64)

    def add(self, row: int, caption: str) -> bool:
        """Whether the row had none before."""
        if self._spans[row, 0] >= 0:
            return False
        start = len(self._content)
        self._content += caption.encode("utf-8", "surrogatepass")
        self._spans[row] = start, len(self._content)
        return True

    def at(self, row: int) -> str | None:
        start, end = self._spans[row].tolist()
        return None if start < 0 else self._content[start:end].decode("utf-8", "surrogatepass")


def _read_captions(folder: Path, files: PackedTexts) -> _Listed | None:
    """Captions of the files; the names in the list are only looked up among these, never opened."""
    sources = [source for name in _CAPTION_FILES if (source := folder / name).is_file()]
    if not sources:
        return None
    found, places = _Listed(files), Places(files)
    for source in sources:
        with source.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    entry = json.loads(line)
                    name = entry["file_name"]
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    raise ValueError(f'{source}:{number}: not a JSON object with "file_name" ({error})') from error
                row = places.find(name) if isinstance(name, str) else None
                new = found.add(row, caption_of(entry)) if row is not None else name not in found.orphans
                if not isinstance(name, str) or not new:
                    raise ValueError(f"{source}:{number}: file_name {name!r} is repeated or not a string")
                if row is None:
                    found.orphans[name] = None
    return found


def _beside(image: Path) -> Path:
    return image.with_suffix(".txt")


def _beginning(file: Path) -> bytes:
    """Size and first bytes of a file; of one that is not there, that."""
    try:
        with file.open("rb") as content:
            return f" {os.fstat(content.fileno()).st_size} ".encode() + content.read(_STAMP_BYTES)
    except FileNotFoundError:
        return b" -1"
