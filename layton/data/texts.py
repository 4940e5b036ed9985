"""Many short texts in little memory."""

from __future__ import annotations

from abc import abstractmethod
from array import array
from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray


class LazyTexts(Sequence[str]):
    """A list of texts that are put together when they are asked for."""

    @abstractmethod
    def at(self, place: int) -> str:
        """The text at a place in [0, len)."""

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        """One text, or a list of some."""
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        return self.at(range(len(self))[index])


class PackedTexts(LazyTexts):
    """A list of texts that takes their bytes and 8 more for each, where Python's own takes a hundred.

    Forked loader workers share it: reading a text changes no count of references in what they have in common.

    Args:
        texts: In any number; they are read once.
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        content, ends = bytearray(), array("q")
        for text in texts:
            content += text.encode("utf-8", "surrogatepass")
            ends.append(len(content))
        self._content = np.frombuffer(content, dtype=np.uint8)
        self._ends = np.frombuffer(ends, dtype=np.int64) if ends else np.zeros(0, dtype=np.int64)

    @classmethod
    def of_arrays(cls, content: NDArray[np.uint8], ends: NDArray[np.int64]) -> PackedTexts:
        """Texts from what `arrays` gave.

        Args:
            content: (n,) uint8.
            ends: (count,) int64, rising.

        Raises:
            ValueError: They do not fit together.
        """
        rising = np.concatenate([[0], ends, [len(content)]])
        if content.dtype != np.uint8 or ends.dtype != np.int64 or (np.diff(rising) < 0).any():
            raise ValueError("no packed texts: their ends do not rise up to the length of the content")
        texts = cls()
        texts._content, texts._ends = content, ends
        return texts

    @property
    def arrays(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """UTF-8 of all texts (n,), and where each ends in it (count,)."""
        return self._content, self._ends

    def __len__(self) -> int:
        """How many."""
        return len(self._ends)

    def at(self, place: int) -> str:
        """See `LazyTexts.at`."""
        start = int(self._ends[place - 1]) if place else 0
        return self._content[start : int(self._ends[place])].tobytes().decode("utf-8", "surrogatepass")


def clean_text(text: str) -> str:
    """A text without spaces around it, and with "?" for halves of characters, which nobody could write to a file."""
    return text.strip().encode("utf-8", "replace").decode("utf-8")


def key_digests(keys: Sequence[str]) -> NDArray[np.int64]:
    """8 bytes of each key (n,), to find keys that are alike within one process."""
    return np.fromiter((hash(key) for key in keys), dtype=np.int64, count=len(keys))


def repeated(texts: Sequence[str]) -> list[int]:
    """Places, rising, of texts that occur more than once; those of other texts with an equal digest may be among them.

    Args:
        texts: Looked at once.
    """
    digests = key_digests(texts)
    alike, counts = np.unique(digests, return_counts=True)
    found: list[int] = np.flatnonzero(np.isin(digests, alike[counts > 1])).tolist()
    return found


class Places:
    """Where texts stand in a list of different ones, found in 16 bytes for each.

    Args:
        texts: The list.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        digests = key_digests(texts)
        self._texts, self._order = texts, np.argsort(digests)
        self._digests = digests[self._order]

    def find(self, text: str) -> int | None:
        """The place of a text in the list; None if it is not there."""
        digest = hash(text)
        first, end = (int(np.searchsorted(self._digests, digest, side)) for side in ("left", "right"))
        return next((int(place) for place in self._order[first:end] if self._texts[place] == text), None)
