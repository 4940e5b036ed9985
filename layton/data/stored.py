"""Stored images, whatever they lie in: tar shards, a folder of files, or a table of Hugging Face's ``datasets``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from layton.data.types import Split
from layton.errors import UsageError

if TYPE_CHECKING:
    from layton.data.sources import StoredSource
    from layton.data.transforms import SampleTransform

Kind = Literal["table", "folder", "shards"]
_SHARDS = "*.tar"


@dataclass(frozen=True, slots=True)
class Columns:
    """Columns of a table; see `layton.data.hf_datasets.HFDatasetSource`.

    Attributes:
        image: Of the images.
        caption: Of the captions.
        ids: Of unique names.
    """

    image: str | None = None
    caption: str | None = None
    ids: str | None = None


def kind_of(places: Sequence[str]) -> Kind:
    """What stored images lie in; ``places`` as for `open_stored`."""
    from layton.data.folder import holds_images
    from layton.data.hf_datasets import PARQUET, is_saved

    one = Path(places[0]) if len(places) == 1 else None
    if one is None or not one.is_dir():
        return "table" if places and all(place.endswith(PARQUET) for place in places) else "shards"
    if is_saved(one):
        return "table"
    if any(one.glob(_SHARDS)):  # a Parquet file beside them is what a downloader noted
        return "shards"
    return "table" if any(one.glob(f"*{PARQUET}")) and not holds_images(one) else "folder"


def source_of(place: str) -> tuple[str, dict[str, str]]:
    """Class path of the source that reads a place, and its first setting, as a run file names them."""
    kind = kind_of([place])
    if kind == "shards" and Path(place).is_dir():
        place = str(Path(place) / _SHARDS)
    path, setting = {
        "table": ("hf_datasets.HFDatasetSource", "place"),
        "folder": ("folder.ImageFolderSource", "folder"),
        "shards": ("shards.ShardSource", "shards"),
    }[kind]
    return f"layton.data.{path}", {setting: place}


def open_stored(
    places: Sequence[str],
    *,
    split: Split | None,
    transform: SampleTransform | None = None,
    classes: bool = False,
    repeated_keys: bool = False,
    columns: Columns | None = None,
    max_bad: int | None = None,
) -> StoredSource:
    """Find out what kind of data is meant, and open it.

    Args:
        places: Tar shards (files or patterns); or one folder of tar shards, of image files, or of a table (which
            ``datasets`` saved, or Parquet files); or Parquet files.
        split: Keep only this split; None for all.
        transform: Makes tensors of equal size; a centre crop to 256 pixels by default.
        classes: Captions are the names of the folders in which the files lie.
        repeated_keys: Accept a key that occurs in several shards.
        columns: Of a table, where they are not the usual ones.
        max_bad: How many different broken images are tolerated; None for any number.

    Raises:
        UsageError: A setting is of another kind of data.
        ValueError: There are no such images.
    """
    kind = kind_of(places)
    named = {name: value for name, value in asdict(columns or Columns()).items() if value is not None}
    if named and kind != "table":
        raise UsageError(f"only tables have columns, and {' '.join(places)} is none")
    if classes and kind != "folder":
        raise UsageError("--class-folders is for one folder of image files")
    if kind == "table":
        from layton.data.hf_datasets import HFDatasetSource

        return HFDatasetSource(list(places), split=split, transform=transform, max_bad=max_bad, **named)
    if kind == "folder":
        from layton.data.folder import ImageFolderSource

        return ImageFolderSource(places[0], split=split, classes=classes, transform=transform, max_bad=max_bad)
    from layton.data.shards import ShardSource

    bare = [place for place in places if Path(place).is_dir() and not any(Path(place).glob(_SHARDS))]
    if bare and len(places) > 1:
        raise UsageError(f"{bare[0]} holds no tar shards; of folders of images only one is taken at a time")
    return ShardSource(
        [str(Path(place) / _SHARDS) if Path(place).is_dir() else place for place in places],
        split=split,
        transform=transform,
        captions="optional",
        repeated_keys=repeated_keys,
        max_bad=max_bad,
    )
