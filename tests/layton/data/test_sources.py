from __future__ import annotations

import pytest
import torch

from layton.data.sources import ScenesSource
from layton.data.transforms import RandomCrop
from layton.scenes import caption, render, sample_scene


def test_a_scene_is_the_rendered_one_with_its_caption():
    data = ScenesSource(length=5, size=64)
    sample = data[3]
    pixels = torch.from_numpy(render(sample_scene(3), 64)).permute(2, 0, 1)
    assert sample["key"] == "scenes/3" and sample["caption"] == caption(sample_scene(3), language="en")
    assert torch.equal(((sample["image"] + 1) * 127.5).round().to(torch.uint8), pixels)
    assert sample["image"].dtype == torch.float32


def test_splits_begin_where_the_project_says():
    assert [ScenesSource(split=s, length=2, size=16, offset=1)[0]["key"] for s in ("train", "validation", "test")] == [
        "scenes/1",
        "scenes/1000000001",
        "scenes/2000000001",
    ]


def test_the_share_of_chinese_captions_is_kept_and_chosen_by_the_seed():
    data = ScenesSource(length=200, size=16, chinese=0.25)
    texts = [data.sample(i, seed=i)["caption"] for i in range(200)]
    assert 30 <= sum(not text.isascii() for text in texts) <= 70
    assert texts == [data.sample(i, seed=i)["caption"] for i in range(200)]


def test_captions_are_reworded_as_often_as_asked():
    def canonical(share):
        data = ScenesSource(length=200, size=16, reworded=share)
        return sum(data.sample(i, seed=i)["caption"] == caption(sample_scene(i)) for i in range(200))

    assert canonical(0.0) == 200 and canonical(1.0) < canonical(0.5) < 160


def test_captions_tell_relations_as_often_as_asked_and_are_known_without_the_image():
    relations = ("left of", "right of", "above", "below")
    counts = {}
    for share in (0.0, 0.5, 1.0):
        data = ScenesSource(length=300, size=16, related=share)
        texts = [data.caption(i, seed=i) for i in range(300)]
        assert texts[:40] == [data.sample(i, seed=i)["caption"] for i in range(40)]
        counts[share] = sum(any(relation in text for relation in relations) for text in texts)
    assert counts[0.0] < counts[0.5] < counts[1.0]


def test_scenes_can_be_cropped():
    data = ScenesSource(length=2, size=64, transform=RandomCrop(32, flip=0.0))
    assert data[0]["image"].shape == (3, 32, 32)
    assert not torch.equal(data.sample(0, seed=1)["image"], data.sample(0, seed=2)["image"])


def test_wrong_arguments_are_refused():
    for options in ({"length": 0}, {"size": 0}, {"chinese": 1.5}, {"related": -0.1}, {"split": None}, {"split": "val"}):
        with pytest.raises(ValueError, match=r"."):
            ScenesSource(**options)
    with pytest.raises(IndexError):
        ScenesSource(length=2, size=16)[2]
