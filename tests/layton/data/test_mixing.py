from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layton.data.mixing import MixedSource
from layton.data.randomness import mix, permute
from layton.data.sources import SampleSource


class Numbers(SampleSource):
    def __init__(self, name, length):
        self.name, self.length = name, length

    def __len__(self):
        return self.length

    def sample(self, index, *, seed):
        return {"key": f"{self.name}/{index}", "seed": str(seed)}


def epoch_keys(mixed, epoch):
    return [mixed[epoch * len(mixed) + index]["key"] for index in range(len(mixed))]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 700), st.integers(0, 2**63))
def test_permute_is_a_permutation(length, key):
    assert sorted(permute(index, length, key=key) for index in range(length)) == list(range(length))


def test_permutations_look_random():
    length, trials = 50, 2000
    first = Counter(permute(0, length, key=mix(trial)) for trial in range(trials))
    chi2 = sum((first[place] - trials / length) ** 2 / (trials / length) for place in range(length))
    assert chi2 < 100  # 49 degrees of freedom: beyond 100 once in 40,000
    neighbours = sum(permute(i + 1, 5000, key=1) == permute(i, 5000, key=1) + 1 for i in range(4999))
    assert neighbours < 10


def test_mix_is_fixed_for_ever():
    assert mix(1, 2, 3) == 2623250113353451629
    assert len({mix(i, j) for i in range(50) for j in range(50)}) == 2500


def test_an_epoch_holds_every_sample_once_in_another_order_each_time():
    mixed = MixedSource([Numbers("a", 30), Numbers("b", 12)], seed=3)
    epochs = [epoch_keys(mixed, epoch) for epoch in range(3)]
    assert all(Counter(keys) == Counter(epochs[0]) and len(set(keys)) == 42 for keys in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_order_is_a_function_of_seed_and_position_only():
    one, two = (MixedSource([Numbers("a", 30), Numbers("b", 12)], seed=3) for _ in range(2))
    backwards = [two[position] for position in reversed(range(100))][::-1]
    assert [one[position] for position in range(100)] == backwards
    other = MixedSource([Numbers("a", 30), Numbers("b", 12)], seed=4)
    assert epoch_keys(other, 0) != epoch_keys(one, 0)


def test_augmentation_seeds_differ_at_every_position():
    mixed = MixedSource([Numbers("a", 30)])
    assert len({mixed[position]["seed"] for position in range(300)}) == 300


def test_weights_are_exact_in_every_epoch_and_no_sample_comes_again_before_its_turn():
    mixed = MixedSource([Numbers("a", 7), Numbers("b", 1000)], weights=[1, 3], length=40)
    seen = Counter()
    for epoch in range(7):
        keys = epoch_keys(mixed, epoch)
        assert Counter(key[0] for key in keys) == {"a": 10, "b": 30}
        seen.update(keys)
    assert {seen[f"a/{index}"] for index in range(7)} == {10}  # 70 places for 7 samples
    assert len([key for key in seen if key[0] == "b"]) == 210


def test_sources_are_spread_over_the_epoch():
    keys = epoch_keys(MixedSource([Numbers("a", 500), Numbers("b", 500)]), 0)
    assert all(30 <= sum(key[0] == "a" for key in keys[start : start + 100]) <= 70 for start in range(0, 1000, 100))


def test_unshuffled_sources_follow_one_another():
    mixed = MixedSource([Numbers("a", 2), Numbers("b", 3)], shuffle=False)
    assert epoch_keys(mixed, 0) == epoch_keys(mixed, 5) == ["a/0", "a/1", "b/0", "b/1", "b/2"]


@pytest.mark.parametrize(
    "options", [{"weights": [1]}, {"weights": [1, -1]}, {"weights": [1, 0]}, {"weights": [1, 1e9]}, {"length": 0}]
)
def test_weights_and_lengths_that_do_not_fit_are_refused(options):
    with pytest.raises(ValueError, match=r"weights|length"):
        MixedSource([Numbers("a", 5), Numbers("b", 5)], **options)
    with pytest.raises(ValueError, match="not empty"):
        MixedSource([Numbers("a", 0)])
    with pytest.raises(ValueError, match="position must be >= 0"):
        MixedSource([Numbers("a", 1)])[-1]
