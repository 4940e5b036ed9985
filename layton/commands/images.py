"""Image files named on the command line: found, decoded in threads, fitted to squares, one bounded window at a time."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from layton.data.geometry import FitPolicy, Geometry, fit_image
from layton.data.images import SUFFIXES, UNREAD_SUFFIXES, ImageError, load_image, tell_unread
from layton.data.threads import in_threads


@dataclass(frozen=True, slots=True)
class ImageFile:
    """One image file.

    Attributes:
        path: Where it is.
        name: What to call it: the path as it was given, or the path below the folder that was given.
    """

    path: Path
    name: str


@dataclass(frozen=True, slots=True, eq=False)
class FittedImage:
    """A decoded image and its square.

    Attributes:
        name: The file's name.
        original: Upright "RGB" image; None unless it was asked for.
        square: "RGB" image (S, S).
        geometry: What was done to make it square.
    """

    name: str
    original: Image.Image | None
    square: Image.Image
    geometry: Geometry


class ImageFiles:
    """Files and folders of images, walked through as often as wanted without keeping a list.

    A file is taken whatever its name; in folders and the folders in them, what ends in .jpg, .jpeg, .png or .webp.

    Args:
        given: Files and folders.

    Raises:
        ValueError: If one does not exist, or a folder holds no image.
    """

    def __init__(self, given: Sequence[Path]) -> None:
        self._given = tuple(given)
        self._count = 0
        for path in self._given:
            if not path.exists():
                raise ValueError(f"{path}: no such file or folder")
            unread = Counter[str]()
            found = sum(1 for _ in _below(path, unread)) if path.is_dir() else 1
            tell_unread(path, unread)
            if not found:
                raise ValueError(f"{path}: no .jpg, .jpeg, .png or .webp file in this folder")
            self._count += found

    def __len__(self) -> int:
        """Number of files."""
        return self._count

    def __iter__(self) -> Iterator[ImageFile]:
        """In the order given, folders sorted."""
        for path in self._given:
            if path.is_dir():
                yield from (ImageFile(file, file.relative_to(path).as_posix()) for file in _below(path))
            else:
                yield ImageFile(path, path.as_posix())


class FittedImages:
    """Decodes images in threads, in order, with at most a few at a time in memory.

    Args:
        files: What to decode.
        size: Side of the squares in pixels.
        policy: How images become square.
        max_bad: How many unreadable images are passed over, each told in one line; one more is an error.
        keep_original: Whether the decoded image is kept beside its square.
        num_threads: Decoding threads; one for each processor, at most 8, by default.

    Attributes:
        bad: What was wrong with the images passed over, "name: reason" each.
    """

    def __init__(
        self,
        files: Iterable[ImageFile],
        size: int,
        *,
        policy: FitPolicy = "crop",
        max_bad: int = 0,
        keep_original: bool = False,
        num_threads: int | None = None,
    ) -> None:
        self._files = files
        self._size = size
        self._policy: FitPolicy = policy
        self._max_bad = max_bad
        self._keep_original = keep_original
        self._num_threads = num_threads or min(8, os.cpu_count() or 1)
        self.bad: list[str] = []

    def __iter__(self) -> Iterator[FittedImage]:
        """All readable images in order.

        Raises:
            ImageError: For the first unreadable image beyond the number allowed.
        """
        for result in in_threads(self._load, self._files, num_threads=self._num_threads):
            if isinstance(result, FittedImage):
                yield result
                continue
            self.bad.append(str(result))
            if len(self.bad) > self._max_bad:
                raise ImageError(f"{result} (--max-bad passes over so many of such images)") from result
            sys.stderr.write(f"layton: passed over {result}\n")

    def _load(self, file: ImageFile) -> FittedImage | ImageError:
        try:
            image = load_image(file.path)
        except ImageError as error:
            return error
        square, geometry = fit_image(image, self._size, policy=self._policy)
        return FittedImage(file.name, image if self._keep_original else None, square, geometry)


def _below(folder: Path, unread: Counter[str] | None = None) -> Iterator[Path]:
    """Image files, sorted; those of other kinds are counted by their suffix."""

    def fail(error: OSError) -> None:
        raise ValueError(f"{error.filename} cannot be read ({error.strerror or error})") from error

    for parent, folders, names in os.walk(folder, onerror=fail):
        folders.sort()
        for name in sorted(names):
            suffix = Path(name).suffix.lower()
            if suffix in SUFFIXES:
                yield Path(parent) / name
            elif unread is not None and suffix in UNREAD_SUFFIXES:
                unread[suffix] += 1
