"""Sources: map-style data sets in which a sample is a pure function of (index, seed)."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from layton.data.bad import BadImages
from layton.data.images import ImageError
from layton.data.randomness import mix, permute
from layton.data.transforms import Fit, SampleTransform
from layton.data.types import ImageSample, Split, check_split
from layton.scenes import Scene, Texture, as_position, render, sample_scene, scene_key, split_seeds, textured_seeds
from layton.scenes.captions import Wording, describe
from layton.scenes.captions import wording as scene_wording
from layton.scenes.contrary import Change, contrary_caption
from layton.scenes.placed import placed_caption

_MAX_REPLACEMENTS = 20


class SampleSource(Dataset[Any], ABC):
    """Anything with a length whose samples depend on nothing but an index and a seed."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def sample(self, index: int, *, seed: int) -> Mapping[str, Any]:
        """One sample: a flat mapping of tensors and strings, with a unique "key".

        Args:
            index: In [0, len).
            seed: Decides augmentation and every other choice; in [0, 2^63).
        """

    def said(self) -> str:
        """Hex digits over all that it says, of a source that can tell cheaply; empty for others."""
        return ""

    def inner(self) -> Sequence[SampleSource]:
        """The sources that this one is made of; none for most."""
        return ()

    def __getitem__(self, index: int) -> Any:
        """The sample at `index` with seed 0."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is not in [0, {len(self)})")
        return self.sample(index, seed=0)


def walk(sources: Iterable[SampleSource]) -> Iterator[SampleSource]:
    """These sources and all that they are made of."""
    for source in sources:
        yield source
        yield from walk(source.inner())


class ImageSource(SampleSource):
    """A source of captioned images."""

    @abstractmethod
    def sample(self, index: int, *, seed: int) -> ImageSample:
        """One captioned image; see `SampleSource.sample`."""

    def caption(self, index: int, *, seed: int) -> str:
        """The caption of `sample(index, seed=seed)`; sources that know it without the image do not load that."""
        return self.sample(index, seed=seed)["caption"]

    def settings(self) -> str:
        """What pictures depend on that a few of them may not show, for what is kept of them; empty for most."""
        return ""


@dataclass(frozen=True, slots=True, eq=False)
class StoredImage:
    """An image as it was stored: decoded, upright, not yet scaled.

    Attributes:
        image: "RGB" image of any size.
        caption: Its text, possibly empty.
        key: Its unique name.
    """

    image: Image.Image
    caption: str
    key: str


class StoredSource(ImageSource):
    """Images from files. A broken one is recorded in `bad` and replaced by another, always the same one.

    Args:
        transform: Makes tensors of equal size; a centre crop to 256 pixels by default.
        max_bad: How many different broken images are tolerated before the run stops; None for any number.
    """

    def __init__(self, *, transform: SampleTransform | None, max_bad: int | None) -> None:
        self.transform = transform if transform is not None else Fit()
        self.bad = BadImages(max_bad)

    def settings(self) -> str:
        """Whether some are mirrored, which neither their size nor their brightness shows."""
        return self.transform.settings()

    @property
    @abstractmethod
    def keys(self) -> Sequence[str]:
        """Unique keys of all samples, in order."""

    @abstractmethod
    def stamp(self) -> str:
        """Hex digits that tell this state of the files from another: by names, sizes and samples of their bytes.

        Files that differ in a few bytes in their middle, and not in size, may have the same; so may folders of many
        images in which some were replaced under their old names, as only some files of them are looked into.
        """

    @abstractmethod
    def told(self, index: int) -> str:
        """What is said of one image, which itself is not looked at: of a broken one, too.

        Args:
            index: In [0, len).

        Raises:
            ImageError: If that cannot be read.
        """

    @abstractmethod
    def load(self, index: int) -> StoredImage:
        """Read and decode one image.

        Args:
            index: In [0, len).

        Raises:
            ImageError: If it is broken.
        """

    def __len__(self) -> int:
        """Number of samples, broken ones included."""
        return len(self.keys)

    def sample(self, index: int, *, seed: int) -> ImageSample:
        """One captioned image; when broken, a replacement chosen by `index` alone. See `SampleSource.sample`."""
        broken: list[str] = []
        for chosen in self._candidates(index):
            try:
                stored = self.load(chosen)
                image = self._transformed(stored, seed)
            except ImageError as error:
                broken.append(str(error))
                self.bad.record(str(error))
                continue
            sample = ImageSample(image=image, caption=stored.caption, key=stored.key)
            if broken:
                sample["bad"] = broken
            return sample
        raise ImageError(f"{self.keys[index]}: broken, and so were {len(broken) - 1} replacements: {broken[-1]}")

    def _transformed(self, stored: StoredImage, seed: int) -> Tensor:
        try:
            return self.transform(stored.image, seed=seed)
        except ImageError as error:
            raise ImageError(f"{stored.key}: {error}") from error

    def _candidates(self, index: int) -> Iterator[int]:
        """The sample itself, then others in an order that belongs to it, so that neighbours of a bad one differ."""
        yield index
        for attempt in range(min(len(self), _MAX_REPLACEMENTS)):
            other = permute(attempt, len(self), key=mix(index))
            if other != index:
                yield other


class ScenesSource(ImageSource):
    """Rendered scenes with exact captions (`layton.scenes`): endless, needs no files, the same everywhere.

    Args:
        split: Which seeds: "train", "validation" or "test".
        length: How many scenes.
        size: Side in pixels.
        offset: Scenes to pass over at the beginning of the split.
        chinese: Share of captions in Chinese, in [0, 1]; chosen by the sample's seed.
        reworded: Share of captions said in another true way than the canonical one, in [0, 1]; chosen likewise.
        related: Share of the captions "a star and a ring" that say instead how the two stand, where that is clear.
        places: Share of captions that say where each object stands (`layton.scenes.placed`) instead of all else.
        textures: Only scenes with one of these backgrounds: plain, stripes, checks, noise; all by default.
        transform: Applied to the rendered scene; by default none, it has the right size already.
    """

    def __init__(
        self,
        *,
        split: Split = "train",
        length: int = 100_000,
        size: int = 256,
        offset: int = 0,
        chinese: float = 0.0,
        reworded: float = 0.0,
        related: float = 0.0,
        places: float = 0.0,
        textures: Sequence[Texture] | None = None,
        transform: SampleTransform | None = None,
    ) -> None:
        if length < 1 or size < 1:
            raise ValueError(f"length and size must be >= 1, got {length} and {size}")
        shares = {"chinese": chinese, "reworded": reworded, "related": related, "places": places}
        if not all(0.0 <= share <= 1.0 for share in shares.values()):
            raise ValueError(f"shares of captions must be in [0, 1], got {shares}")
        known = check_split(split)
        if known is None:
            raise ValueError("scenes have no common order of all splits: choose one")
        self.seeds: Sequence[int] = (
            split_seeds(known, length, offset=offset)
            if textures is None
            else textured_seeds(known, length, textures, offset=offset)
        )
        self.size = size
        self.chinese = chinese
        self.reworded = reworded
        self.related = related
        self.places = places
        self.transform = transform

    def settings(self) -> str:
        """Whether some are mirrored; see `ImageSource.settings`."""
        return "" if self.transform is None else self.transform.settings()

    def __len__(self) -> int:
        """Number of scenes."""
        return len(self.seeds)

    def sample(self, index: int, *, seed: int) -> ImageSample:
        """One captioned scene; see `SampleSource.sample`."""
        scene_seed = self.seeds[index]
        scene = sample_scene(scene_seed)
        pixels = render(scene, self.size)
        if self.transform is not None:
            image = self.transform(Image.fromarray(pixels), seed=seed)
        else:
            tensor = rearrange(torch.from_numpy(pixels), "h w c -> c h w").contiguous().to(torch.float32)
            image = tensor.div_(127.5).sub_(1.0)
        return ImageSample(image=image, caption=self._say(scene, seed), key=scene_key(scene_seed))

    def caption(self, index: int, *, seed: int) -> str:
        """The caption alone, without rendering; see `ImageSource.caption`."""
        return self._say(sample_scene(self.seeds[index]), seed)

    def _say(self, scene: Scene, seed: int) -> str:
        return say(scene, seed, chinese=self.chinese, reworded=self.reworded, related=self.related, places=self.places)


def say(
    scene: Scene,
    seed: int,
    *,
    chinese: float = 0.0,
    reworded: float = 0.0,
    related: float = 0.0,
    places: float = 0.0,
) -> str:
    """A true caption of a scene; a sample's seed chooses language, wording and what is said of it.

    Args:
        scene: What is said.
        seed: The sample's.
        chinese: Share of captions in Chinese, in [0, 1].
        reworded: Share of captions said in another true way than the canonical one, in [0, 1].
        related: Share of scenes of two objects told by how they stand (`layton.scenes.as_position`), in [0, 1].
        places: Share of captions that say where each object stands (`layton.scenes.placed`) instead, in [0, 1].
    """
    if mix(seed, scene.seed, 6) < places * 2**63:
        return placed_caption(scene)
    return describe(*_told(scene, seed, chinese=chinese, reworded=reworded, related=related))


def say_contrary(
    scene: Scene,
    seed: int,
    changes: Sequence[Change],
    *,
    chinese: float = 0.0,
    reworded: float = 0.0,
    related: float = 0.0,
) -> str:
    """The caption of `say`, wrong in one thing; the seed chooses in what.

    Args:
        scene: As in `say`, like all others.
        seed: The sample's.
        changes: What may be wrong.
        chinese: Share in Chinese.
        reworded: Share said in another way.
        related: Share told by how they stand.

    Returns:
        The caption; empty if none of the changes applies (`layton.scenes.contrary.contrary_caption`).
    """
    told, wording = _told(scene, seed, chinese=chinese, reworded=reworded, related=related)
    return contrary_caption(told, wording, changes, random.Random(mix(seed, scene.seed, 5))) or ""  # noqa: S311


def _told(scene: Scene, seed: int, *, chinese: float, reworded: float, related: float) -> tuple[Scene, Wording]:
    """What a sample's seed makes of a scene to say, and how it is said."""
    language, reword, variant, told = (mix(seed, scene.seed, choice) for choice in (0, 1, 2, 4))
    if told < related * 2**63:
        scene = as_position(scene) or scene
    return scene, scene_wording(
        scene,
        language="zh" if language < chinese * 2**63 else "en",
        variant=variant if reword < reworded * 2**63 else None,
    )
