from __future__ import annotations

from collections import Counter

import pytest
import torch

from layton.data.bad import BadImages, TooManyBadImagesError
from layton.data.loader import OrderedLoader, ResumableLoader, collate
from layton.data.mixing import MixedSource
from layton.data.sampler import ResumableSampler
from layton.data.shards import ShardSource
from layton.data.sources import SampleSource
from layton.data.transforms import Fit


class Numbers(SampleSource):
    def __init__(self, length, bad=()):
        self.length, self.bad_indexes = length, set(bad)

    def __len__(self):
        return self.length

    def sample(self, index, *, seed):
        sample = {"key": f"n/{index}", "image": torch.tensor([index, seed % 1000])}
        return sample | ({"bad": [f"n/{index}: broken"]} if index in self.bad_indexes else {})


def mixed(length=23, seed=0, **options):
    return MixedSource([Numbers(length, **options)], seed=seed)


def take(loader, count):
    """The next `count` batches over as many epochs as it takes."""
    batches = []
    while len(batches) < count:
        for batch in loader:
            batches.append((batch["key"], batch["image"].tolist()))
            if len(batches) == count:
                break
    return batches


@pytest.mark.parametrize("first_workers, second_workers", [(0, 0), (0, 2), (1, 1), (2, 2), (2, 0)])
def test_n_and_m_batches_equal_n_stop_resume_m(first_workers, second_workers):
    expected = take(ResumableLoader(mixed(), batch_size=4), 16)  # 5 batches an epoch
    stops = (3, 5, 7) if first_workers == second_workers == 0 else (5, 7)
    for stop in stops:
        first = ResumableLoader(mixed(), batch_size=4, num_workers=first_workers)
        assert take(first, stop) == expected[:stop]
        second = ResumableLoader(mixed(), batch_size=4, num_workers=second_workers)
        second.load_state_dict(first.state_dict())
        assert take(second, 16 - stop) == expected[stop:]


def test_every_batch_is_a_place_to_stop_even_after_a_previous_resume():
    expected = take(ResumableLoader(mixed(), batch_size=4), 12)
    seen, state = [], None
    for _ in range(12):
        loader = ResumableLoader(mixed(), batch_size=4)
        if state is not None:
            loader.load_state_dict(state)
        seen += take(loader, 1)
        state = loader.state_dict()
    assert seen == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_an_iteration_given_up_is_continued_by_the_next(workers):
    loader = ResumableLoader(mixed(), batch_size=4, num_workers=workers)
    seen = [batch for count in (2, 1, 4) for batch in take(loader, count)]
    assert seen == take(ResumableLoader(mixed(), batch_size=4), 7)


def test_loading_does_not_touch_the_random_state_of_training():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    for workers in (0, 1):
        take(ResumableLoader(mixed(), batch_size=4, num_workers=workers), 6)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_an_epoch_without_duplicates(world_size):
    ranks = [ResumableLoader(mixed(24), batch_size=4, rank=r, world_size=world_size) for r in range(world_size)]
    batches = [[batch["key"] for batch in loader] for loader in ranks]
    assert {len(keys) for keys in batches} == {24 // 4 // world_size}
    keys = [key for rank in batches for batch in rank for key in batch]
    assert len(set(keys)) == len(keys) == 24


@pytest.mark.filterwarnings("ignore:the run goes on amid an epoch")
@pytest.mark.parametrize(("before", "after"), [((1, 4), (2, 2)), ((2, 2), (1, 4)), ((2, 4), (3, 2)), ((1, 3), (1, 5))])
def test_resuming_with_other_ranks_or_batch_size_repeats_and_loses_nothing(before, after):
    def run(loaders, steps):
        return [key for loader in loaders for keys, _ in take(loader, steps) for key in keys]

    def loaders(world_size, batch_size):
        return [
            ResumableLoader(mixed(60), batch_size=batch_size, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]

    first = loaders(*before)
    seen = run(first, 3)
    second = loaders(*after)
    for loader in second:
        loader.load_state_dict(first[0].state_dict())
    step = after[0] * after[1]
    left = 60 - len(seen)
    seen += run(second, left // step)
    assert max(Counter(seen).values()) == 1 and len(seen) == 60 - left % step


def test_state_of_another_sequence_is_refused_by_name():
    state = ResumableLoader(mixed(), batch_size=4).state_dict()
    for other, field in ((mixed(seed=1), "seed: saved 0, now 1"), (mixed(24), "length: saved 23, now 24")):
        with pytest.raises(ValueError, match=field):
            ResumableLoader(other, batch_size=4).load_state_dict(state)
    with pytest.raises(ValueError, match="does not belong"):
        ResumableSampler(23, 4).load_state_dict({"consumed": -1, "length": 23})


def test_an_epoch_shorter_than_a_step_is_refused():
    with pytest.raises(ValueError, match="23 samples do not fill one step of 2 x 12"):
        ResumableSampler(23, 12, world_size=2)
    with pytest.raises(ValueError, match="0 <= rank < world_size"):
        ResumableSampler(23, 4, rank=2, world_size=2)


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_sees_every_sample_once_in_order_each_time(workers):
    loader = OrderedLoader(MixedSource([Numbers(7)], shuffle=False), batch_size=3, num_workers=workers)
    for _ in range(2):
        assert [batch["key"] for batch in loader] == [["n/0", "n/1", "n/2"], ["n/3", "n/4", "n/5"], ["n/6"]]
    assert len(loader) == 3


def test_evaluation_ranks_are_disjoint_and_complete():
    data = MixedSource([Numbers(7)], shuffle=False)
    keys = [
        key for rank in range(2) for batch in OrderedLoader(data, batch_size=2, rank=rank, world_size=2)
        for key in batch["key"]
    ]  # fmt: skip
    assert sorted(keys) == [f"n/{i}" for i in range(7)]


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_counted_across_workers(workers):
    bad = BadImages()
    loader = ResumableLoader(mixed(24, bad=(2, 5, 7)), batch_size=4, num_workers=workers, bad=bad)
    take(loader, 12)
    assert sorted(bad.names) == ["n/2", "n/5", "n/7"] and "n/5: broken" in bad.reasons
    strict = ResumableLoader(mixed(24, bad=(2, 5, 7)), batch_size=4, num_workers=workers, bad=BadImages(2))
    with pytest.raises(TooManyBadImagesError, match="3 broken images, 2 allowed"):
        take(strict, 6)


def test_shards_give_equal_batches_with_and_without_workers(shards):
    def loader(workers):
        source = ShardSource(shards, split=None, transform=Fit(8))
        return ResumableLoader(MixedSource([source], seed=1), batch_size=5, num_workers=workers)

    assert take(loader(0), 6) == take(loader(2), 6)


def test_batches_that_do_not_fit_together_are_refused():
    with pytest.raises(ValueError, match=r"'image' comes in shapes"):
        collate([{"image": torch.zeros(2)}, {"image": torch.zeros(3)}])
    with pytest.raises(ValueError, match="some samples have 'image'"):
        collate([{"image": torch.zeros(2)}, {"key": "x"}])
    assert collate([{"a": "x", "bad": ["p: q"]}, {"a": "y"}]) == {"a": ["x", "y"], "bad": ["p: q"]}


def test_samples_of_other_fields_are_refused_in_any_order():
    plain, more = {"key": "a", "x": torch.zeros(1)}, {"key": "b", "x": torch.zeros(1), "weights": torch.ones(1)}
    for samples in ([plain, more], [more, plain]):
        with pytest.raises(ValueError, match="some samples have 'weights' and some have not"):
            collate(samples)
