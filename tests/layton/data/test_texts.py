from __future__ import annotations

import pickle

import pytest

from layton.data.texts import PackedTexts

TEXTS = ["a red star", "", "三个十字", "\ud800 broken", "last"]


def test_texts_come_back() -> None:
    packed = PackedTexts(iter(TEXTS))
    assert list(packed) == TEXTS and len(packed) == 5
    assert packed[-1] == "last" and packed[1:4] == TEXTS[1:4] and packed[::-2] == TEXTS[::-2]
    assert "三个十字" in packed and packed.index("") == 1
    assert list(pickle.loads(pickle.dumps(packed))) == TEXTS  # noqa: S301  # what a spawned worker gets
    with pytest.raises(IndexError):
        packed[5]
    assert list(PackedTexts()) == []


def test_they_take_their_bytes_and_a_number_each() -> None:
    packed = PackedTexts(f"{number:08d}" for number in range(1000))
    assert packed._content.nbytes + packed._ends.nbytes == 16 * 1000
