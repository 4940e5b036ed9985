"""Are the objects of a scene still there after reconstruction? SceneEval's checker answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from layton.data.types import Split
from layton.progress import progress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from layton.scenes import Scene


@dataclass(frozen=True, slots=True)
class ObjectsKept:
    """Shares in [0, 1] of scenes in which shape and colour of every object are found.

    Attributes:
        kept: After reconstruction.
        kept_alone: After reconstruction, with no object found beside them.
        originals: In the scenes as they were rendered: the checker's own limit.
        scenes: Number of scenes.
        size: Side in pixels.
    """

    kept: float
    kept_alone: float
    originals: float
    scenes: int
    size: int

    def to_dict(self) -> dict[str, Any]:
        """The fields under their names."""
        return asdict(self)

    def summary(self) -> str:
        """One line for people."""
        return (
            f"objects: shape and colour of all kept in {self.kept:.1%} of {self.scenes} scenes "
            f"({self.originals:.1%} in the originals)"
        )


def objects_kept(
    reconstruct: Callable[[Tensor], Tensor], count: int, *, split: Split, size: int, batch_size: int
) -> ObjectsKept:
    """Reconstruct scenes and look for their objects; several processes share the scenes.

    Args:
        reconstruct: Images (B, 3, H, W) in [-1, 1] to the same.
        count: Scenes, from the start of the split.
        split: Whose scenes.
        size: Side in pixels.
        batch_size: Scenes at once.

    Raises:
        ValueError: If there is no scene to look at.
    """
    import numpy as np
    import torch

    from layton.data.images import to_image, to_tensor
    from layton.data.threads import batched
    from layton.ranks import all_reduce_sum, own_share
    from layton.scenes import render, sample_scene, split_seeds

    if count < 1:
        raise ValueError(f"objects must be >= 1, got {count}")
    from PIL import Image

    verdicts: Counter[str] = Counter()
    own = own_share(split_seeds(split, count))
    with progress(len(own), "objects") as bar:
        for seeds in batched(own, batch_size):
            scenes = [sample_scene(seed) for seed in seeds]
            drawn = [render(scene, size) for scene in scenes]
            results = reconstruct(torch.stack([to_tensor(Image.fromarray(pixels)) for pixels in drawn]))
            for scene, pixels, result in zip(scenes, drawn, results, strict=True):
                missing, extra = compare(scene, np.asarray(to_image(result)))
                verdicts["kept"] += not missing
                verdicts["kept_alone"] += not missing and not extra
                verdicts["originals"] += not compare(scene, pixels)[0]
            bar.update(len(seeds))
    names = ("kept", "kept_alone", "originals")
    totals = all_reduce_sum(torch.tensor([verdicts[name] for name in names])).tolist()
    shares = {name: total / count for name, total in zip(names, totals, strict=True)}
    return ObjectsKept(**shares, scenes=count, size=size)


def compare(scene: Scene, pixels: NDArray[np.uint8]) -> tuple[int, int]:
    """Numbers of objects of the scene that are not found by shape and colour, and of objects found beyond them."""
    from layton.sceneval import find_objects

    there = Counter((item.shape, item.colour) for item in scene.objects)
    found = Counter((item.shape, item.colour) for item in find_objects(pixels))
    return (there - found).total(), (found - there).total()
