"""Samples cut down to windows of their grid that show one object each: shapes and words are learnt before layout is."""

from __future__ import annotations

import math
from typing import Any

import torch

from layton.data.randomness import mix
from layton.data.sources import SampleSource, say
from layton.scenes import sample_scene, seed_of_key
from layton.scenes.windows import ObjectWindow, object_windows

_MAX_SCENES = 64  # looked at for one sample; nearly every scene has a window


class ObjectWindows(SampleSource):
    """Squares of the latents or codes of scenes, around one whole object, captioned with that object alone.

    Nine tenths of a scene are background, and its caption speaks of several objects at once. In a window, at a quarter
    of the cost, the object fills a third, and the caption names it alone. A text-to-image network that drew blobs after
    some 240,000 whole scenes drew recognisable shapes 163,000 windows later.

    A sample has ``key``, ``caption`` and what the source has of these: ``latent`` (C, side, side); ``codes``
    (side * side,) with ``positions`` (side * side,), their places on the whole grid, row-major.

    Args:
        source: Latents (`layton.ldm.cache.CachedLatents`) or codes (`generation.data.source.TokenShards`) of scenes.
        side: Rows and columns of a window.
        chinese: Share of captions in Chinese.
        reworded: Share of captions said in another way than the canonical one.

    Raises:
        ValueError: Samples have neither latents nor codes, or what is said of whole scenes (weights of codes, layouts,
            false captions, what is ahead), are not of scenes, or are smaller than a window.
    """

    def __init__(self, source: SampleSource, *, side: int = 8, chinese: float = 0.0, reworded: float = 0.0) -> None:
        self._source = source
        first = source.sample(0, seed=0)
        if seed_of_key(str(first["key"])) is None:
            raise ValueError(f"windows are cut out of scenes, got the key {first['key']!r}")
        if lost := sorted({"weights", "ahead", "layout", "contrary", "shown"} & set(first)):
            raise ValueError(f"windows are of objects alone, and lose what the source says of whole scenes: {lost}")
        if "latent" not in first and "codes" not in first:
            raise ValueError(f"samples have neither 'latent' nor 'codes', but {sorted(first)}")
        self.grid = int(first["latent"].shape[-1] if "latent" in first else math.isqrt(len(first["codes"])))
        if not 1 <= side <= self.grid:
            raise ValueError(f"a window of {side} does not fit into a grid of {self.grid}")
        self.side, self.chinese, self.reworded = side, chinese, reworded

    def inner(self) -> tuple[SampleSource, ...]:
        """What the windows are cut out of."""
        return (self._source,)

    def __len__(self) -> int:
        """As many as there are scenes; every seed gives other windows of them."""
        return len(self._source)

    def sample(self, index: int, *, seed: int) -> dict[str, Any]:
        """A window of this scene, or of the next one that has any; which one depends on the seed."""
        for step in range(_MAX_SCENES):
            sample = self._source.sample((index + step) % len(self), seed=seed)
            seed_of_scene = seed_of_key(str(sample["key"]))
            if seed_of_scene is None:
                raise ValueError(f"windows are cut out of scenes, got the key {sample['key']!r}")
            scene = sample_scene(seed_of_scene)
            windows = object_windows(scene, grid=self.grid, side=self.side)
            if windows:
                window = windows[mix(seed, scene.seed, 3) % len(windows)]
                caption = say(window.scene, seed, chinese=self.chinese, reworded=self.reworded)
                return {"key": sample["key"], "caption": caption, **self._cut(sample, window)}
        raise ValueError(f"no scene from {index} on has an object that fits into a window of {self.side}")

    def _cut(self, sample: Any, window: ObjectWindow) -> dict[str, Any]:
        rows, columns = (slice(start, start + self.side) for start in (window.top, window.left))
        found: dict[str, Any] = {}
        if "latent" in sample:
            found["latent"] = sample["latent"][:, rows, columns].contiguous()
        if "codes" in sample:
            places = torch.arange(self.grid**2).view(self.grid, self.grid)[rows, columns].flatten()
            found |= {"codes": sample["codes"][places], "positions": places}
        return found
