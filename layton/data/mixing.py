"""Weighted mixing of sources, in an order that is a pure function of (seed, epoch, index)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch.utils.data import Dataset

from layton.data.randomness import mix, permute
from layton.data.sources import SampleSource

_ORDER, _SOURCE, _SAMPLE = 1, 2, 3  # keep the three uses of the seed apart


@dataclass(frozen=True, slots=True)
class Place:
    """What stands at one position of the endless training sequence.

    Attributes:
        source: Number of the source.
        index: Index in it.
        seed: Seed of the sample's augmentation.
    """

    source: int
    index: int
    seed: int


class MixedSource(Dataset[Any]):
    """An endless sequence over several sources, read by position: position = epoch * len + index.

    In every epoch each source has its exact share, scattered at random; and a source shows all of its samples once
    before any comes again, also across epochs (but for
    the few positions at an epoch's end that fill no batch). Only the seed is stored: any position costs the same.

    Args:
        sources: What to mix.
        weights: Shares of the sources, of any sum; proportional to their lengths by default.
        length: Positions in an epoch; the sum of the sources' lengths by default.
        seed: Decides order and augmentation.
        shuffle: False gives all sources one after another, in order.

    Raises:
        ValueError: If there is no source, a source is empty, or weights do not fit.
    """

    def __init__(
        self,
        sources: Sequence[SampleSource],
        *,
        weights: Sequence[float] | None = None,
        length: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        self.sources = list(sources)
        self.seed = seed
        self.shuffle = shuffle
        self.lengths = [len(source) for source in self.sources]
        if not self.sources or min(self.lengths) < 1:
            raise ValueError(f"sources must be at least one and not empty, got lengths {self.lengths}")
        if length is not None and length < 1:
            raise ValueError(f"length must be >= 1, got {length}")
        self.length = sum(self.lengths) if length is None else length
        shares = [float(n) for n in self.lengths] if weights is None else [float(weight) for weight in weights]
        if len(shares) != len(self.sources) or not all(0.0 < share < float("inf") for share in shares):
            raise ValueError(f"weights must be {len(self.sources)} numbers above 0, got {weights}")
        self.counts = _apportion(self.length, shares)
        if min(self.counts) == 0:
            raise ValueError(f"weights {shares} leave a source without a place among {self.length}")
        self._ends = list(accumulate(self.counts))

    def __len__(self) -> int:
        """Positions in an epoch."""
        return self.length

    def locate(self, position: int) -> Place:
        """Which sample stands at a position.

        Args:
            position: epoch * len + index, at least 0.

        Raises:
            ValueError: If it is negative.
        """
        if position < 0:
            raise ValueError(f"position must be >= 0, got {position}")
        epoch, index = divmod(position, self.length)
        slot = permute(index, self.length, key=mix(self.seed, _ORDER, epoch)) if self.shuffle else index
        source = next(number for number, end in enumerate(self._ends) if slot < end)
        count, size = self.counts[source], self.lengths[source]
        # How many samples of this source stand before this one since the beginning of training.
        turn, within = divmod(epoch * count + slot - (self._ends[source] - count), size)
        if self.shuffle:
            within = permute(within, size, key=mix(self.seed, _SOURCE, source, turn))
        return Place(source, within, mix(self.seed, _SAMPLE, epoch, index))

    def __getitem__(self, position: int) -> Mapping[str, Any]:
        """The sample at a position; see `locate`."""
        place = self.locate(position)
        return self.sources[place.source].sample(place.index, seed=place.seed)


def _apportion(total: int, shares: list[float]) -> list[int]:
    """Whole numbers of sum `total` in proportion to `shares` (largest remainders first)."""
    exact = [total * share / sum(shares) for share in shares]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts
