"""Windows of latents: one whole object, no part of another, and a caption of it alone."""

from __future__ import annotations

import pytest
import torch

from layton.data.windows import ObjectWindows
from layton.scenes import render, sample_scene
from layton.scenes.splits import is_unseen_caption
from layton.scenes.windows import object_windows

GRID, SIDE = 16, 8


class Latents:
    """Stands for cached latents of the first scenes: channel 0 is the row, channel 1 the column."""

    def __init__(self, first: int = 0, count: int = 40, grid: int = GRID, key: str = "scenes") -> None:
        self.first, self.count, self.key = first, count, key
        rows = torch.arange(grid).float().expand(grid, grid)
        self.latent = torch.stack([rows.T, rows])

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int, *, seed: int) -> dict[str, object]:
        return {"latent": self.latent, "caption": "several things", "key": f"{self.key}/{self.first + index}"}


def test_a_window_shows_one_whole_object():
    checked = 0
    for seed in range(40):
        scene = sample_scene(seed)
        background = render(scene.__class__(scene.task, (), scene.background, scene.seed), 256).astype(int)
        painted = abs(render(scene, 256).astype(int) - background).sum(-1) > 60
        for window in object_windows(scene, grid=GRID, side=SIDE):
            alone, top, left = window.scene, window.top, window.left
            (item,) = alone.objects
            only = abs(render(alone, 256).astype(int) - background).sum(-1) > 60
            rows, columns = (slice(16 * start, 16 * (start + SIDE)) for start in (top, left))
            assert item in scene.objects
            assert only[rows, columns].sum() == only.sum()  # the whole of it
            assert painted[rows, columns].sum() == only.sum()  # and nothing else
            checked += 1
    assert checked > 200


def test_a_sample_is_that_part_of_the_latents_with_the_objects_caption():
    source = ObjectWindows(Latents(), side=SIDE)
    for seed in range(20):
        sample = source.sample(3, seed=seed)
        scene = sample_scene(int(sample["key"].split("/")[1]))
        top, left = int(sample["latent"][0, 0, 0]), int(sample["latent"][1, 0, 0])
        assert sample["latent"].shape == (2, SIDE, SIDE)
        shown = [w.scene for w in object_windows(scene, grid=GRID, side=SIDE) if (w.top, w.left) == (top, left)]
        assert any(sample["caption"].endswith(f"{o.colour} {o.shape}") for alone in shown for o in alone.objects)
        assert "several" not in sample["caption"]


def test_codes_keep_their_places():
    class Codes(Latents):
        def sample(self, index: int, *, seed: int) -> dict[str, object]:
            found = super().sample(index, seed=seed)
            return {"codes": torch.arange(GRID * GRID) + 1000, "caption": found["caption"], "key": found["key"]}

    sample = ObjectWindows(Codes(), side=SIDE).sample(5, seed=2)
    latent = ObjectWindows(Latents(), side=SIDE).sample(5, seed=2)["latent"]
    assert torch.equal(sample["codes"], sample["positions"] + 1000) and sample["codes"].shape == (SIDE * SIDE,)
    assert torch.equal(sample["positions"].view(SIDE, SIDE), (latent[0] * GRID + latent[1]).long())


def test_samples_depend_on_index_and_seed_alone_and_vary_with_both():
    source, again = ObjectWindows(Latents(), side=SIDE, reworded=0.5), ObjectWindows(Latents(), side=SIDE, reworded=0.5)
    drawn = [[source.sample(index, seed=seed) for index in range(10)] for seed in range(10)]
    for seed, row in enumerate(drawn):
        for index, sample in enumerate(row):
            other = again.sample(index, seed=seed)
            assert torch.equal(sample["latent"], other["latent"]) and sample["caption"] == other["caption"]
    assert len({str(row[4]["latent"].flatten().tolist()) + row[4]["caption"] for row in drawn}) > 3


def test_held_out_combinations_are_passed_over():
    source = ObjectWindows(Latents(first=0, count=400), side=SIDE)
    captions = {source.sample(index, seed=seed)["caption"] for index in range(400) for seed in range(2)}
    assert len(captions) > 50 and not any(is_unseen_caption(caption) for caption in captions)
    every = {f"{'an' if c[0] in 'aeiou' else 'a'} {c} {s}" for c in _COLOURS for s in _SHAPES}
    assert any(is_unseen_caption(caption) for caption in every)  # there are such


_COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
_SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "diamond")


def test_wrong_latents_are_refused():
    with pytest.raises(ValueError, match="window of 8 does not fit into a grid of 4"):
        ObjectWindows(Latents(grid=4), side=8)
    with pytest.raises(ValueError, match="photos-0001"):
        ObjectWindows(Latents(key="photos-0001"), side=4)


def test_what_is_said_of_whole_scenes_is_not_lost_unseen():
    class Weighed(Latents):
        def sample(self, index, *, seed):
            return {**super().sample(index, seed=seed), "weights": torch.ones(4)}

    with pytest.raises(ValueError, match=r"lose what the source says of whole scenes: \['weights'\]"):
        ObjectWindows(Weighed(), side=4)
