"""Datasets of Hugging Face's ``datasets``: folders that it saved, or Parquet files as its hub keeps them."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from layton.data.images import DEFAULT_LIMITS, ImageError, ImageLimits, load_image
from layton.data.shards import expand_shards, sampled_bytes
from layton.data.sources import StoredImage, StoredSource
from layton.data.texts import LazyTexts, PackedTexts, clean_text, key_digests
from layton.data.transforms import SampleTransform
from layton.data.types import NUM_FOLDS, Split, check_split, split_of_key, told_split

CAPTION_COLUMNS = ("caption", "text", "prompt", "label")
PARQUET = ".parquet"


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by ``save_to_disk``, of one dataset or of several."""
    one = all((folder / name).is_file() for name in ("state.json", "dataset_info.json"))
    return one or (folder / "dataset_dict.json").is_file()


class HFDatasetSource(StoredSource):
    """Captioned images from a table; keys are "name/row number", or "name/id" with ``ids``.

    A folder of ``Dataset.save_to_disk`` is read where it lies; of several (``DatasetDict``) name one. Parquet files are
    first copied to the cache of ``datasets`` (``$HF_DATASETS_CACHE``), because single rows cannot be read from them.
    Nothing is fetched.

    Args:
        place: The folder; or Parquet files, by paths, patterns or a folder.
        image: Column of the images, which must lie in the table as files (JPEG, PNG or WebP).
        caption: Column of the captions; of lists the first is taken, of class labels their names. By default the first
            of ``caption``, ``text``, ``prompt`` and ``label`` that there is, and without one captions are empty.
        ids: Column of unique names; row numbers by default.
        split: Keep only this split (`split_of_key`); None for all.
        transform: Makes tensors of equal size; a centre crop to 256 pixels by default.
        max_bad: How many different broken images are tolerated; None for any number.
        limits: What is refused from an image's header.

    Raises:
        ImportError: ``datasets`` is not installed.
        ValueError: There is no such dataset or column, an id occurs twice, or the split is empty.
    """

    def __init__(
        self,
        place: str | list[str],
        *,
        image: str = "image",
        caption: str | None = None,
        ids: str | None = None,
        split: Split | None = "train",
        transform: SampleTransform | None = None,
        max_bad: int | None = 100,
        limits: ImageLimits | None = None,
    ) -> None:
        super().__init__(transform=transform, max_bad=max_bad)
        self.split = check_split(split)
        self.limits = limits or DEFAULT_LIMITS
        places = [place] if isinstance(place, str) else place
        name, table, self._files = _open(places)
        if caption is None:
            caption = next((column for column in CAPTION_COLUMNS if column in table.column_names), None)
        wanted = [column for column in dict.fromkeys((image, caption, ids)) if column is not None]
        missing = [column for column in wanted if column not in table.column_names]
        if missing:
            raise ValueError(f"{places[0]} has no column {missing[0]!r}, only {', '.join(table.column_names)}")
        self._image, self._caption = image, caption
        self._ids = ids
        self._classes = None if caption is None else _class_names(table.features[caption])
        names = None if ids is None else PackedTexts(_column(table, ids))
        if names is not None and len(np.unique(key_digests(names))) < len(names):
            raise ValueError(f"{places[0]}: the column {ids!r} names some images alike")
        self._table = _undecoded(table.select_columns(wanted), image)
        self._captions = None if caption is None else table.select_columns([caption])
        self._keys = _RowKeys(name, len(table), names, self.split)
        if not len(self._keys):
            raise ValueError(f"{told_split(split)}{places[0]} holds no images")

    @property
    def keys(self) -> Sequence[str]:
        """Unique keys of all samples, in the order of rows."""
        return self._keys

    def stamp(self) -> str:
        """See `StoredSource.stamp`; of every file the size, and some of its bytes."""
        facts = [len(self._table), self._image, self._caption, self._ids, self._keys.name, self.split]
        found = hashlib.sha256(json.dumps(facts).encode())
        for file in self._files:
            for piece in sampled_bytes(file):
                found.update(piece)
        return found.hexdigest()

    def load(self, index: int) -> StoredImage:
        """Read and decode one image; see `StoredSource.load`."""
        key, row = self._keys[index], self._table[self._keys.row(index)]
        value = row[self._image]
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            raise ImageError(f"{key}: no file of an image in the column {self._image!r}, but {_kind(value)}")
        if len(content) > self.limits.max_bytes:
            raise ImageError(f"{key}: {len(content)} bytes, more than the {self.limits.max_bytes} allowed")
        caption = "" if self._caption is None else self._said(row[self._caption])
        return StoredImage(load_image(content, name=key, limits=self.limits), caption, key)

    def told(self, index: int) -> str:
        """See `StoredSource.told`."""
        if self._captions is None:
            return ""
        return self._said(self._captions[self._keys.row(index)][self._caption])

    def _said(self, value: Any) -> str:
        if isinstance(value, list):
            value = value[0] if value else None
        if self._classes is not None and isinstance(value, int):
            return self._classes[value] if 0 <= value < len(self._classes) else ""
        return "" if value is None else clean_text(str(value))


class _RowKeys(LazyTexts):
    """Keys of the wanted rows, put together when they are asked for."""

    def __init__(self, name: str, count: int, ids: PackedTexts | None, split: Split | None) -> None:
        self.name, self._ids = name, ids
        wanted = np.ones(count, dtype=bool)
        if split is not None and ids is not None:
            wanted = np.fromiter((split_of_key(each) == split for each in ids), dtype=bool, count=count)
        elif split is not None:  # numbers: their rest decides
            folds = np.array([split_of_key(str(fold)) == split for fold in range(NUM_FOLDS)])
            wanted = folds[np.arange(count) % NUM_FOLDS]
        self._rows = np.flatnonzero(wanted)

    def __len__(self) -> int:
        """How many."""
        return len(self._rows)

    def at(self, place: int) -> str:
        """See `LazyTexts.at`."""
        return f"{self.name}/{self._name_of(self.row(place))}"

    def row(self, place: int) -> int:
        """Of the table."""
        return int(self._rows[place])

    def _name_of(self, row: int) -> str:
        return f"{row:09d}" if self._ids is None else self._ids[row]


def _column(table: Any, name: str) -> Iterator[str]:
    """Values of a column as texts; by Arrow's pieces, as rows one by one take thirty times as long."""
    for piece in table.select_columns([name]).with_format("arrow")[:].column(name).chunks:
        yield from map(str, piece.to_pylist())


def _class_names(feature: Any) -> Sequence[str] | None:
    """Names of the classes that a column of labels, or of lists of them, numbers."""
    return getattr(getattr(feature, "feature", feature), "names", None)


def _open(places: list[str]) -> tuple[str, Any, list[Path]]:
    """Name, table and files of a dataset."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError("tables of Hugging Face need its package: pip install 'layton[datasets]'") from error
    folder = Path(places[0])
    if len(places) == 1 and is_saved(folder):
        found = datasets.load_from_disk(str(folder))
        if isinstance(found, datasets.DatasetDict):
            raise ValueError(f"{folder} holds several datasets: name one, such as {folder / next(iter(found))}")
        return folder.resolve().name, found, sorted(Path(file["filename"]) for file in found.cache_files)
    files = expand_shards([f"{place}/*{PARQUET}" if Path(place).is_dir() else place for place in places])
    odd = [file for file in files if file.suffix != PARQUET]
    if odd:
        raise ValueError(f"{odd[0]}: a Parquet file ends in {PARQUET}")
    name = (folder if folder.is_dir() else folder.absolute().parent).resolve().name
    counts = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # it would ask the network, of local files as well
    try:
        patterns = [glob.escape(str(file)) for file in files]
        return name, datasets.load_dataset("parquet", data_files=patterns, split="train"), files
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counts


def _undecoded(table: Any, image: str) -> Any:
    """The table with images as files: they are decoded here, within limits."""
    import datasets

    if isinstance(table.features[image], datasets.Image):
        return table.cast_column(image, datasets.Image(decode=False))
    return table


def _kind(value: object) -> str:
    return "a path alone" if isinstance(value, dict) else type(value).__name__
