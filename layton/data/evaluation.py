"""The images of an evaluation: scenes, a folder or shards, in a fixed order, as often as wanted."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from layton.data.threads import batched, in_threads
from layton.data.types import Share, Split
from layton.errors import UsageError
from layton.ranks import num_ranks, own_rank, own_share

if TYPE_CHECKING:
    from torch import Tensor

    from layton.data.sources import ImageSource

SCENES = "scenes"
_NUM_SCENES = 1000


@dataclass(frozen=True, slots=True, eq=False)
class EvaluationImages:
    """The first images of a split, in batches.

    Attributes:
        source: Where they come from; a broken image is an error.
        name: Of the data, for the protocol.
        split: Which split, or all.
        count: How many.
        size: Side in pixels.
        batch_size: Images in a batch; the last one may be smaller.
    """

    source: ImageSource
    name: str
    split: Share
    count: int
    size: int
    batch_size: int

    @property
    def preprocessing(self) -> str:
        """For the protocol."""
        if self.name == SCENES:
            return f"rendered at {self.size} pixels"
        return f"central square scaled to {self.size} pixels, Pillow's bicubic filter"

    @property
    def numbers(self) -> Sequence[int]:
        """Those of this process, where several share the images."""
        return own_share(range(self.count))

    def __iter__(self) -> Iterator[Tensor]:
        """Batches (B, 3, S, S) in [-1, 1] of this process's images, from the first."""
        import torch

        load = partial(_load, self.source)
        threads = min(8, os.cpu_count() or 1)
        for batch in batched(in_threads(load, self.numbers, num_threads=threads), self.batch_size):
            yield torch.stack(batch)

    def tell_share(self) -> None:
        """Say on stderr, when all is done, that these were not all stored images."""
        if self.split != "all" and self.name != SCENES and own_rank() == 0:
            told = f"{self.count:,} images of the split {self.split} of {self.name}"
            sys.stderr.write(f"layton: these were {told}; --split all takes every one\n")


def open_images(
    data: Sequence[str],
    *,
    split: Share,
    count: int | None,
    size: int,
    batch_size: int,
    image_column: str | None = None,
    caption_column: str | None = None,
) -> EvaluationImages:
    """Find out what kind of data is meant, and open it.

    Args:
        data: The word ``scenes``, or stored images (`layton.data.stored.open_stored`).
        split: Which split; ``all`` of stored images takes every one.
        count: How many images; 1,000 scenes or all stored images by default. Never more than there are.
        size: Side in pixels.
        batch_size: Images in a batch.
        image_column: Of a table, where it is not the usual one.
        caption_column: Likewise.

    Raises:
        UsageError: A column is named of what is no table.
        ValueError: If there are no such images, a number is below 1, or all scenes are asked for, which have no end.
    """
    from layton.data.sources import ScenesSource
    from layton.data.stored import Columns, open_stored
    from layton.data.transforms import Fit

    if (count is not None and count < 1) or batch_size < 1:
        raise ValueError(f"count and batch_size must be >= 1, got {count} and {batch_size}")
    part: Split | None = None if split == "all" else split
    if part is None and list(data) == [SCENES]:
        raise ValueError("scenes are endless: their split is train, validation or test, not all")
    source: ImageSource
    name = " ".join(Path(item).name for item in data)
    columns = Columns(image_column, caption_column)
    if list(data) == [SCENES] and columns != Columns():
        raise UsageError("only tables have columns, and scenes are none")
    if part is not None and list(data) == [SCENES]:
        source, name = ScenesSource(split=part, length=count or _NUM_SCENES, size=size), SCENES
    else:
        source = open_stored(data, split=part, transform=Fit(size), columns=columns, max_bad=0)
    total = len(source)
    found = EvaluationImages(source, name, split, min(count or total, total), size, batch_size)
    if found.count < num_ranks():  # told by all of them, so that none waits for another
        raise ValueError(f"{found.count} images cannot be shared by {num_ranks()} processes")
    return found


def scenes_of(split: Share) -> Split:
    """The split of scenes that goes with a share of stored images: test, where that is all of them."""
    return "test" if split == "all" else split


def _load(source: ImageSource, index: int) -> Tensor:
    return source.sample(index, seed=0)["image"]
