"""What a student of one-step tasks is given, and what it is to make of it: each side is a source of images.

Two sources of equal length are the two sides of a task (`layton.distillation.task_pairs.TaskPairs`). `WithHoles` and
`Reduced` make the first side of inpainting and of super-resolution of any captioned images, which are the second side
themselves. For editing, two folders of pictures before and after will do; of scenes there are `SceneCases`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import Literal, get_args

import torch
from PIL import Image
from torch import Tensor

from layton.data.images import to_tensor
from layton.data.randomness import mix
from layton.data.sources import ImageSource, SampleSource, say
from layton.data.types import ImageSample, Split, check_split
from layton.distillation.one_step_tasks import resize
from layton.scenes import Scene, is_unseen, render, scene_key, split_seeds
from layton.scenes.cases import edit_case, hole_of

SceneTask = Literal["edit", "inpaint"]
Side = Literal["before", "after"]
GREY = 0.0


class SceneCases(ImageSource):
    """Scenes before or after a change, with the caption of what is to come out.

    ``edit``: what the caption names first or second, or a whole counted group, gets another colour. ``inpaint``: one
    object is missing, and a grey square is where it belongs. Those that training may not see, since they show held-out
    combinations, are passed over in the split train.

    How an object that is missing was turned no caption says, and a student of one step that learns from all of them
    draws their mean, a star as a disc: ``upright`` wants one answer of the many.

    Args:
        task: Which change.
        side: The picture that is given or the one that is wanted.
        split: Which seeds.
        length: How many cases.
        size: Side in pixels.
        offset: Cases to pass over at the beginning of the split.
        upright: What was missing comes back upright, not turned as it was.
        chinese: As in `layton.data.sources.ScenesSource`, like the next two.
        reworded: See there.
        places: See there.

    Raises:
        ValueError: An unknown task or side, no split, or a length or size below 1.
    """

    def __init__(
        self,
        task: SceneTask,
        side: Side,
        *,
        split: Split = "train",
        length: int = 4096,
        size: int = 256,
        offset: int = 0,
        upright: bool = False,
        chinese: float = 0.0,
        reworded: float = 0.0,
        places: float = 0.0,
    ) -> None:
        if task not in get_args(SceneTask) or side not in get_args(Side):
            raise ValueError(f"expected a task and a side of {get_args(SceneTask)}, {get_args(Side)}: {task}, {side}")
        known = check_split(split)
        if known is None or length < 1 or size < 1 or offset < 0:
            raise ValueError(f"need a split, and numbers above 0: {split}, length {length}, size {size}, {offset}")
        self.task, self.side, self.size, self.upright = task, side, size, upright and task == "inpaint"
        self.chinese, self.reworded, self.places = chinese, reworded, places
        self.seeds = tuple(islice(_seeds(task, known), offset, offset + length))

    def __len__(self) -> int:
        """Number of cases."""
        return len(self.seeds)

    def sample(self, index: int, *, seed: int) -> ImageSample:
        """One picture; see `SampleSource.sample`."""
        case = self.seeds[index]
        wanted = self._wanted(case)
        image = _picture(wanted, self.size) if self.side == "after" else self._before(case)
        return ImageSample(image=image, caption=self._say(wanted, seed), key=scene_key(case))

    def caption(self, index: int, *, seed: int) -> str:
        """The caption alone, without rendering; see `ImageSource.caption`."""
        return self._say(self._wanted(self.seeds[index]), seed)

    def settings(self) -> str:
        """Task and side; see `ImageSource.settings`."""
        return f"{self.task} {self.side}" + (" upright" if self.upright and self.side == "after" else "")

    def _wanted(self, seed: int) -> Scene:
        wanted = _wanted(self.task, seed, upright=self.upright)
        assert wanted is not None  # noqa: S101 - only such seeds were taken
        return wanted

    def _say(self, scene: Scene, seed: int) -> str:
        return say(scene, seed, chinese=self.chinese, reworded=self.reworded, places=self.places)

    def _before(self, seed: int) -> Tensor:
        hole = hole_of(seed) if self.task == "inpaint" else None
        if hole is None:
            return _picture(edit_case(seed).scene, self.size)
        image = _picture(hole.without(), self.size)
        rows, columns = hole.box(self.size)
        image[:, rows, columns] = GREY
        return image


class WithHoles(ImageSource):
    """Images with a grey rectangle each, whose place and size are a function of the sample's seed.

    Args:
        source: The images.
        smallest: Shortest side of a rectangle, as a share of the image's.
        largest: Longest.

    Raises:
        ValueError: Shares are not 0 < smallest <= largest < 1.
    """

    def __init__(self, source: ImageSource, *, smallest: float = 0.15, largest: float = 0.5) -> None:
        if not 0.0 < smallest <= largest < 1.0:
            raise ValueError(f"need 0 < smallest <= largest < 1, got {smallest} and {largest}")
        self.source, self.shares = source, (smallest, largest)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.source)

    def inner(self) -> Sequence[SampleSource]:
        """The images."""
        return (self.source,)

    def sample(self, index: int, *, seed: int) -> ImageSample:
        """One image with its hole; see `SampleSource.sample`."""
        sample = self.source.sample(index, seed=seed)
        image = sample["image"].clone()
        generator = torch.Generator().manual_seed(mix(seed, index, 7))
        rows, columns = (self._span(length, generator) for length in image.shape[-2:])
        image[:, rows, columns] = GREY
        return replace_image(sample, image)

    def caption(self, index: int, *, seed: int) -> str:
        """See `ImageSource.caption`."""
        return self.source.caption(index, seed=seed)

    def settings(self) -> str:
        """Shares; see `ImageSource.settings`."""
        return f"holes of {self.shares} {self.source.settings()}".rstrip()

    def _span(self, length: int, generator: torch.Generator) -> slice:
        share, place = torch.rand(2, generator=generator).tolist()
        smallest, largest = self.shares
        extent = max(1, round(length * (smallest + share * (largest - smallest))))
        start = round(place * (length - extent))
        return slice(start, start + extent)


class Reduced(ImageSource):
    """Images reduced bicubically and enlarged again: what super-resolution starts from.

    Args:
        source: The images.
        scale: By how much; divides their sides.

    Raises:
        ValueError: ``scale`` is below 2, or, when read, an image's sides are no multiples of it.
    """

    def __init__(self, source: ImageSource, *, scale: int = 4) -> None:
        if scale < 2:
            raise ValueError(f"scale must be >= 2, got {scale}")
        self.source, self.scale = source, scale

    def __len__(self) -> int:
        """Number of images."""
        return len(self.source)

    def inner(self) -> Sequence[SampleSource]:
        """The images."""
        return (self.source,)

    def sample(self, index: int, *, seed: int) -> ImageSample:
        """One image; see `SampleSource.sample`."""
        sample = self.source.sample(index, seed=seed)
        if any(side % self.scale for side in sample["image"].shape[-2:]):
            raise ValueError(
                f"{sample['key']}: {tuple(sample['image'].shape[-2:])} pixels are no multiple of {self.scale}"
            )
        small = resize(sample["image"][None], 1 / self.scale).clamp(-1, 1)
        return replace_image(sample, resize(small, self.scale)[0].clamp(-1, 1))

    def caption(self, index: int, *, seed: int) -> str:
        """See `ImageSource.caption`."""
        return self.source.caption(index, seed=seed)

    def settings(self) -> str:
        """Scale; see `ImageSource.settings`."""
        return f"reduced by {self.scale} {self.source.settings()}".rstrip()


def replace_image(sample: ImageSample, image: Tensor) -> ImageSample:
    """A sample with another image (3, H, W) in [-1, 1]."""
    changed = sample.copy()
    changed["image"] = image
    return changed


def _seeds(task: SceneTask, split: Split) -> Iterator[int]:
    """Seeds of a split of which there is a case that the split may show."""
    first = split_seeds(split, 1)[0]
    for seed in count(first):
        wanted = _wanted(task, seed)
        if wanted is not None and not (split == "train" and is_unseen(wanted)):
            yield seed


def _wanted(task: SceneTask, seed: int, *, upright: bool = False) -> Scene | None:
    """The scene that is to come out; None if there is no such case."""
    if task == "edit":
        return edit_case(seed).wanted
    hole = hole_of(seed)
    if hole is None:
        return None
    return hole.upright() if upright else hole.scene


def _picture(scene: Scene, size: int) -> Tensor:
    return to_tensor(Image.fromarray(render(scene, size)))
