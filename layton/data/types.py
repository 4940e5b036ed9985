"""What every source yields: one captioned image; and the splits, the same at every stage of the project."""

from __future__ import annotations

import hashlib
from typing import Literal, NotRequired, TypedDict, get_args

from torch import Tensor

Split = Literal["train", "validation", "test"]
Share = Split | Literal["all"]  # of stored images


def told_split(split: Split | None) -> str:
    """Of a split, for messages; nothing where all of it is meant."""
    return "" if split is None else f"split {split!r} of "


SPLITS: tuple[Split, ...] = get_args(Split)
NUM_FOLDS = 5


class ImageSample(TypedDict):
    """One captioned image.

    Attributes:
        image: (3, H, W) float32 in [-1, 1].
        caption: Text, possibly empty.
        key: Unique name, e.g. "scenes/123" or "photos-0001/010004".
        bad: "name: reason" of the broken images this sample replaces; present only when there are any.
    """

    image: Tensor
    caption: str
    key: str
    bad: NotRequired[list[str]]


class ImageBatch(TypedDict):
    """A collated batch.

    Attributes:
        image: (B, 3, H, W) float32 in [-1, 1].
        caption: B captions.
        key: B keys.
    """

    image: Tensor
    caption: list[str]
    key: list[str]


def split_of_key(key: str) -> Split:
    """The split a stored image belongs to: its integer key modulo 5 is 0 for test, 1 for validation, else train.

    Only the last part of a path-like key counts ("photos-0001/010004" is 10004). A key that is not an integer is
    replaced by a stable hash, so that the answer is the same on every machine and in every process.

    Args:
        key: Key of a sample.
    """
    name = key.rsplit("/", 1)[-1]
    if name.isascii() and name.isdigit():
        number = int(name)
    else:
        number = int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
    fold = number % NUM_FOLDS
    return "test" if fold == 0 else "validation" if fold == 1 else "train"


def check_split(split: str | None) -> Split | None:
    """Return `split` itself.

    Args:
        split: "train", "validation", "test", or None for everything.

    Raises:
        ValueError: If it is none of these.
    """
    for known in SPLITS:
        if split == known:
            return known
    if split is None:
        return None
    raise ValueError(f"split must be one of {', '.join(SPLITS)} or None, got {split!r}")
