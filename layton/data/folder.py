"""Folders of image files, with captions beside them or in one JSON-lines file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from layton.data.images import DEFAULT_LIMITS, ImageError, ImageLimits, load_image
from layton.data.shards import caption_of
from layton.data.sources import StoredImage, StoredSource
from layton.data.transforms import SampleTransform
from layton.data.types import Split, check_split, split_of_key, told_split

_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
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
        files = _find_images(self.folder)
        self._captions = _class_names(self.folder, files) if classes else _read_captions(self.folder)
        for name in sorted(set(self._captions) - {path.as_posix() for path in files}):
            self.bad.record(f"{name}: a caption without an image")
        self._files = [path for path in files if self.split is None or split_of_key(path.stem) == self.split]
        self._keys = _unique_keys(self.folder.resolve().name, self._files)
        if not self._files:
            raise ValueError(f"{told_split(split)}{folder} holds no images")

    @property
    def keys(self) -> Sequence[str]:
        """Unique keys "folder/path without suffix", sorted by path."""
        return self._keys

    def stamp(self) -> str:
        """See `StoredSource.stamp`; of every file the size, and of some how they begin."""
        found = hashlib.sha256(json.dumps(self._captions, sort_keys=True).encode())
        looked_into = max(1, len(self._files) // _STAMPED)
        for index, (key, path) in enumerate(zip(self._keys, self._files, strict=True)):
            image = self.folder / path
            for file in (image, image.with_suffix(".txt")):
                found.update(f"\n{key} {_size(file)}".encode("utf-8", "replace"))
                if index % looked_into == 0 and file.is_file():
                    with file.open("rb") as content:
                        found.update(content.read(_STAMP_BYTES))
        return found.hexdigest()

    def load(self, index: int) -> StoredImage:
        """Read and decode one image; see `StoredSource.load`."""
        path = self._files[index]
        image = load_image(self.folder / path, limits=self.limits)
        return StoredImage(image, self._caption(path), self._keys[index])

    def _caption(self, path: Path) -> str:
        listed = self._captions.get(path.as_posix())
        if listed is not None:
            return listed
        text = (self.folder / path).with_suffix(".txt")
        try:
            if text.stat().st_size > _MAX_CAPTION_BYTES:
                raise ImageError(f"{self.folder / path}: caption of more than {_MAX_CAPTION_BYTES} bytes")
            return text.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return ""
        except (OSError, UnicodeDecodeError) as error:
            raise ImageError(f"{self.folder / path}: unreadable caption ({error})") from error


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return -1


def holds_images(folder: Path) -> bool:
    """Whether there is an image file in a folder or the folders in it."""
    return next(_images(folder), None) is not None


def _find_images(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in _images(folder))


def _images(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        yield from (Path(parent) / name for name in names if Path(name).suffix.lower() in _SUFFIXES)


def _class_names(folder: Path, files: list[Path]) -> dict[str, str]:
    """File name to class."""
    alone = [path for path in files if len(path.parts) == 1]
    if alone:
        raise ValueError(f"{folder / alone[0]}: lies in no class's folder")
    return {path.as_posix(): path.parts[0] for path in files}


def _unique_keys(folder_name: str, files: list[Path]) -> list[str]:
    owner: dict[str, Path] = {}
    for path in files:
        key = f"{folder_name}/{path.with_suffix('').as_posix()}"
        if key in owner:
            raise ValueError(f"{owner[key]} and {path} would share the key {key!r}")
        owner[key] = path
    return list(owner)


def _read_captions(folder: Path) -> dict[str, str]:
    """File name to caption; the names are only looked up among files found, never opened."""
    captions: dict[str, str] = {}
    for source in (folder / name for name in _CAPTION_FILES):
        if not source.is_file():
            continue
        with source.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    entry = json.loads(line)
                    name = entry["file_name"]
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    raise ValueError(f'{source}:{number}: not a JSON object with "file_name" ({error})') from error
                if not isinstance(name, str) or name in captions:
                    raise ValueError(f"{source}:{number}: file_name {name!r} is repeated or not a string")
                captions[name] = caption_of(entry)
    return captions
