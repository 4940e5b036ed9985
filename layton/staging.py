"""Folders of results: nothing of them is to be seen before all of them is there, and no name leads out of them."""

from __future__ import annotations

import re
import shutil
import unicodedata
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from layton.errors import UsageError
from layton.folder import full_disk_told

_MAX_BYTES = 100  # of a stem; file systems take 255 for a name


@contextmanager
def staged(out: Path, *, overwrite: bool = True) -> Iterator[Path]:
    """A temporary folder on the same disk whose files become those of ``out`` when the block ends well.

    A new folder appears whole. In one that is there already files of other names stay, and each of the others is
    replaced at once. If the block fails, ``out`` is as it was before.

    Args:
        out: Folder to write; made if needed.
        overwrite: Whether files that are there already may be replaced.

    Raises:
        UsageError: If a file is there already that may not be replaced.
        ValueError: If ``out`` exists and is no folder.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} exists and is no folder")
    place = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    part = place / f".{out.name}.{uuid.uuid4().hex[:8]}.part"
    try:
        with full_disk_told(out):
            part.mkdir()
            yield part
            if out.exists():
                if not overwrite:
                    require_free(out, [str(path.relative_to(part)) for path in part.rglob("*") if path.is_file()])
                _move_files(part, out)
            else:
                out.parent.mkdir(parents=True, exist_ok=True)
                part.rename(out)  # all at once
    finally:
        shutil.rmtree(part, ignore_errors=True)


def require_absent(out: Path) -> None:
    """Stop before a folder or file is made that is there already.

    Raises:
        UsageError: It is.
    """
    if out.exists():
        raise UsageError(f"{out} exists already: take another --out")


def require_free(out: Path, names: Iterable[str]) -> None:
    """Stop before files are made that would replace others.

    Raises:
        UsageError: Names the first that is there already.
    """
    there = next((out / name for name in sorted(names) if (out / name).exists()), None)
    if there is not None:
        raise UsageError(f"{there} exists already: take another --out, or say --overwrite")


def _move_files(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.is_dir():
            _move_files(path, target / path.name)
        else:
            path.replace(target / path.name)


class SafeNames:
    """File names made from names that nobody has checked: one plain component each, and no two alike.

    Letters and digits of every script, ``-``, ``_`` and ``.`` stay, all else becomes ``_``; names that differ only in
    case count as alike, since some file systems think so.
    """

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def unique(self, name: str, *, suffix: str) -> str:
        """A file name for ``name``.

        Args:
            name: Path-like name; folders and the last suffix are dropped.
            suffix: What the file name ends in, e.g. ".png".
        """
        stem = safe_stem(name)
        chosen, number = stem, 1
        while chosen.casefold() in self._taken:
            number += 1
            chosen = f"{stem}-{number}"
        self._taken.add(chosen.casefold())
        return chosen + suffix


def safe_stem(name: str) -> str:
    """The last component of a path-like name without its suffix, of harmless characters, at most 100 bytes long."""
    # NFKC first: it turns look-alikes such as the full-width slash into what they look like
    plain = unicodedata.normalize("NFKC", name).replace("\\", "/").replace("\0", "_")
    stem = re.sub(r"[^\w.-]", "_", PurePosixPath(plain).stem).strip(".")
    return stem.encode("utf-8", "ignore")[:_MAX_BYTES].decode("utf-8", "ignore") or "image"
