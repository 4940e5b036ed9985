from __future__ import annotations

import pytest

from layton.data.types import check_split, split_of_key


def test_integer_keys_split_by_their_remainder_modulo_five():
    names = [split_of_key(f"photos-0001/{number:06d}") for number in range(10000, 10010)]
    assert names == ["test", "validation", "train", "train", "train"] * 2


def test_other_keys_split_by_a_hash_that_never_changes():
    assert [split_of_key(key) for key in ("dog", "a/cat", "b/cat", "٣", "bird")] == [
        "test", "train", "train", "train", "test"
    ]  # fmt: skip
    counts = [split_of_key(f"name{i}") for i in range(2000)]
    assert 330 < counts.count("test") < 470 and 330 < counts.count("validation") < 470


def test_unknown_splits_are_refused():
    assert check_split(None) is None and check_split("test") == "test"
    with pytest.raises(ValueError, match="'val'"):
        check_split("val")
