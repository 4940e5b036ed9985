"""Captions without pictures: what image-free distillation trains on.

Samples hold "caption" and "key". Order, epochs, mixing and resume are those of every other source
(`layton.data.mixing`): a pure function of (seed, epoch, index).
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from layton.data.sources import SampleSource, say
from layton.data.texts import PackedTexts
from layton.data.types import Split, check_split, split_of_key
from layton.scenes import Scene, objects_placed, sample_scene, scene_key, split_seeds
from layton.scenes.world import MAX_DIAMETER

MAX_LINE_BYTES = 4096
_PASSED_OVER = 32  # scenes that are looked at for one of large objects


class SceneCaptions(SampleSource):
    """Captions of Scenes, endless and seeded; the same words as `ScenesSource` says, with nothing rendered.

    Training seeds never show a held-out combination, so training prompts never name one.

    Args:
        split: Which seeds: "train", "validation" or "test".
        length: How many scenes.
        offset: Scenes to pass over at the beginning of the split.
        chinese: Share of captions in Chinese, in [0, 1]; chosen by the sample's seed.
        reworded: Share of captions said in another true way than the canonical one, in [0, 1]; chosen likewise.
        related: Share of captions of two objects that say how they stand, where that is clear; chosen likewise.
        places: Share of captions that say where each object stands (`layton.scenes.placed`) instead of all else.
        placed: Steps of the side in which samples also hold where the objects stand, ``layout`` (5, 5), see
            `layton.scenes.objects_placed`; 0 for none.
        min_diameter: Of all objects, as a fraction of the side; a scene with a smaller one is passed over for one of
            the same task, from the next seed that gives one without, or if none does soon, the one that comes nearest.
            Keys are then ``scene/<task>/<seed>``, of which no reward knows the scene.

    Raises:
        ValueError: A number is out of range, or there is no such split.
    """

    def __init__(
        self,
        *,
        split: Split = "train",
        length: int = 1_000_000,
        offset: int = 0,
        chinese: float = 0.0,
        reworded: float = 0.0,
        related: float = 0.0,
        places: float = 0.0,
        placed: int = 0,
        min_diameter: float = 0.0,
    ) -> None:
        if length < 1 or placed < 0 or not 0 <= min_diameter <= MAX_DIAMETER:
            raise ValueError(
                f"need length >= 1, placed >= 0 and min_diameter in [0, {MAX_DIAMETER}], "
                f"got {length}, {placed} and {min_diameter}"
            )
        self._shares = {"chinese": chinese, "reworded": reworded, "related": related, "places": places}
        if not all(0.0 <= share <= 1.0 for share in self._shares.values()):
            raise ValueError(f"shares of captions must be in [0, 1], got {self._shares}")
        known = check_split(split)
        if known is None:
            raise ValueError("scenes have no common order of all splits: choose one")
        self.seeds = split_seeds(known, length, offset=offset)
        self.placed, self._min_diameter = placed, min_diameter

    def __len__(self) -> int:
        """Number of scenes."""
        return len(self.seeds)

    def sample(self, index: int, *, seed: int) -> Mapping[str, Any]:
        """One caption; see `SampleSource.sample`."""
        scene = self._scene(index)
        own = self._min_diameter == 0  # else the seed alone does not give the scene: its task is wanted, too
        key = scene_key(scene.seed) if own else f"scene/{scene.task}/{scene.seed}"
        sample: dict[str, Any] = {"caption": say(scene, seed, **self._shares), "key": key}
        if self.placed:
            sample["layout"] = torch.from_numpy(objects_placed(scene, self.placed))
        return sample

    def _scene(self, index: int) -> Scene:
        """The scene of a place, or the next one of large objects."""
        best = sample_scene(self.seeds[index])
        for ahead in range(1, _PASSED_OVER + 1):
            if _smallest(best) >= self._min_diameter:
                break
            scene = sample_scene(self.seeds[(index + ahead) % len(self.seeds)], task=best.task)
            best = max(best, scene, key=_smallest)
        return best


def _smallest(scene: Scene) -> float:
    return min(item.diameter for item in scene.objects)


class PromptFile(SampleSource):
    """A UTF-8 text file with one prompt on each line; blank lines do not count.

    Args:
        path: The file.
        split: Only the prompts of one split (number of the line modulo 5, as everywhere); None for all of them.

    Raises:
        ValueError: There is no such file, it is not UTF-8, a line is over 4,096 bytes, or no prompt is left.
    """

    def __init__(self, path: str, *, split: Split | None = None) -> None:
        self.path = Path(path)
        wanted = check_split(split)
        lines = [line for line in read_lines(self.path) if wanted is None or split_of_key(str(line[0])) == wanted]
        self._numbers = array("q", (number for number, _ in lines))
        self._texts = PackedTexts(text for _, text in lines)
        if not lines:
            raise ValueError(f"{path}: no prompts{f' in split {wanted!r}' if wanted else ''}, one a line is wanted")

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self._numbers)

    def said(self) -> str:
        """See `SampleSource.said`."""
        total = hashlib.sha256()
        for number, text in zip(self._numbers, self._texts, strict=True):
            total.update(f"{number} {text}\n".encode())
        return total.hexdigest()[:16]

    def sample(self, index: int, *, seed: int) -> Mapping[str, Any]:
        """One prompt; the seed has no influence. See `SampleSource.sample`."""
        return {"caption": self._texts[index], "key": f"{self.path.stem}/{self._numbers[index]}"}


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The non-blank lines of a UTF-8 file, stripped, with their numbers from 1.

    Raises:
        ValueError: There is no such file, it is not UTF-8, or a line is over 4,096 bytes.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error
    found = []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        if len(line) > MAX_LINE_BYTES:
            raise ValueError(f"{path}: line {number} has {len(line)} bytes; a line has at most {MAX_LINE_BYTES}")
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: line {number} is not UTF-8 ({error.reason} at byte {error.start})") from error
        if text:
            found.append((number, text))
    return found
