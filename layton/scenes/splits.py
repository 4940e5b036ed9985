"""Which seeds may train, and which attribute combinations never do.

A seed's split is a matter of its size; one combination in ten, chosen by a hash of its canonical caption,
is kept out of every training scene, so that validation and test can tell memory from composition.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Final, Literal

from layton.scenes.captions import canonical_caption
from layton.scenes.world import Scene

Split = Literal["train", "validation", "test"]

SPLIT_STRIDE: Final = 1_000_000_000
# Personalises the hash. This number is one under which the small families come out at one in ten as well: 8 of the 80
# single objects, of 7 shapes and 7 colours, and 31 of the 320 counts. Changing it changes every training set.
_HASH_PERSON: Final = b"scenes-428"
_STARTS: Final[dict[Split, int]] = {"train": 0, "validation": SPLIT_STRIDE, "test": 2 * SPLIT_STRIDE}

_KEY: Final = "scenes/"


def scene_key(seed: int) -> str:
    """Name of a scene as a sample: ``scenes/<seed>``."""
    return f"{_KEY}{seed}"


def seed_of_key(key: str) -> int | None:
    """Seed of a scene's `scene_key`; None of any other sample's key."""
    name = key.removeprefix(_KEY)
    return int(name) if name != key and name.isascii() and name.isdigit() else None


def split_of_seed(seed: int) -> Split:
    """The split a scene's seed belongs to: below 10^9 train, below 2x10^9 validation, above test.

    Raises:
        ValueError: if ``seed`` is negative.
    """
    if seed < 0:
        raise ValueError(f"a scene's seed must be >= 0, got {seed}")
    if seed < SPLIT_STRIDE:
        return "train"
    return "validation" if seed < 2 * SPLIT_STRIDE else "test"


def split_seeds(split: Split, count: int, *, offset: int = 0) -> range:
    """``count`` consecutive seeds of a split, ``offset`` seeds after its beginning.

    Raises:
        ValueError: if the split is unknown or the range would leave it.
    """
    if split not in _STARTS:
        raise ValueError(f"split must be one of {sorted(_STARTS)}, got {split!r}")
    if count < 0 or offset < 0 or (split != "test" and offset + count > SPLIT_STRIDE):
        raise ValueError(f"{count} seeds at offset {offset} do not fit in split {split!r}")
    start = _STARTS[split] + offset
    return range(start, start + count)


@lru_cache(maxsize=65_536)
def is_unseen_caption(canonical: str) -> bool:
    """Whether the combination that this canonical caption names is kept out of training (one in ten)."""
    digest = hashlib.blake2b(canonical.encode("utf-8"), digest_size=8, person=_HASH_PERSON).digest()
    return int.from_bytes(digest, "big") % 10 == 0


def is_unseen(scene: Scene) -> bool:
    """Whether the scene shows a combination that never occurs in training seeds."""
    return is_unseen_caption(canonical_caption(scene))
