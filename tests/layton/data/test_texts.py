from __future__ import annotations

import pickle

import pytest

from layton.data.texts import PackedTexts, Places, repeated

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


def test_a_text_is_found_in_a_list_also_where_digests_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    assert repeated(["b", "a", "b", "c"]) == [0, 2] and repeated(TEXTS) == [] == repeated([])
    places = Places(PackedTexts(TEXTS))
    assert [places.find(text) for text in [*TEXTS, "new"]] == [0, 1, 2, 3, 4, None]
    places._digests = places._digests * 0 + hash("last")
    assert [places.find(text) for text in ("last", "new")] == [4, None]
