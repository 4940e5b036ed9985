"""HiPA's applications scored on scenes: is one step enough to edit, to inpaint and to enlarge?

The paper (arXiv 2311.18158) shows editing, inpainting and super-resolution in pictures. Scenes have exact ground truth
and a checker that finds objects, so here each has a score. Every case is a pure function of a scene's seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from generation.evaluation.application_verdicts import circles, fills, is_found, shows
from layton.data.images import to_image, to_tensor
from layton.data.threads import batched
from layton.distillation.one_step_model import OneStepModel
from layton.distillation.one_step_tasks import resize
from layton.scenes import Scene, render, sample_scene, split_seeds
from layton.scenes.cases import edit_case, holes
from layton.scenes.splits import Split
from layton.sceneval import find_objects

PSNR_CAP = 100.0


@dataclass(frozen=True, slots=True)
class TaskSettings:
    """How the tasks are done; the times are to be chosen on the validation split.

    Attributes:
        edit_t: Time to which a source is noised to be edited.
        edit_strength: See `layton.distillation.one_step_tasks.edit`.
        edit_threshold: As there.
        edit_softness: As there.
        inpaint_t: Time to which surroundings are noised.
        enlarge_t: Time to which the enlarged image is noised.
        enlarge_strength: See `layton.distillation.one_step_tasks.super_resolve`.
        scale: Enlargement along a side.
    """

    edit_t: float = 800.0
    edit_strength: float = 1.0
    edit_threshold: float = 0.4
    edit_softness: int = 1
    inpaint_t: float = 900.0
    enlarge_t: float = 250.0
    enlarge_strength: float = 1.0
    scale: int = 4


@dataclass(frozen=True, slots=True)
class EditScore:
    """Editing: a colour named by the prompt is another one in the new prompt.

    Attributes:
        changed: Share of scenes in which the objects meant have the new colour, at their places.
        correct: Share in which, besides, all other objects are as they were and none came.
        limit: Share that the checker finds correct in drawings of the new scene: the most that can be reached.
        psnr_outside: Mean over scenes, outside of the circles of what was to change, in dB.
        scenes: Number of scenes.
    """

    changed: float
    correct: float
    limit: float
    psnr_outside: float
    scenes: int


@dataclass(frozen=True, slots=True)
class InpaintScore:
    """Inpainting: an object that the prompt names is missing, and a hole is where it belongs.

    Attributes:
        inside: Share of scenes in which exactly the missing object is found in the hole.
        limit: The same for drawings of the whole scene.
        psnr_outside: Smallest over scenes, outside of the hole, in dB.
        scenes: Number of scenes.
    """

    inside: float
    limit: float
    psnr_outside: float
    scenes: int


@dataclass(frozen=True, slots=True)
class EnlargeScore:
    """Super-resolution, beside bicubic enlargement of the same images; means over scenes.

    Attributes:
        psnr: In dB.
        psnr_bicubic: In dB.
        epd: Lower is better; None if it cannot be measured.
        epd_bicubic: As ``epd``.
        scenes: Number of scenes.
    """

    psnr: float
    psnr_bicubic: float
    epd: float | None
    epd_bicubic: float | None
    scenes: int


def score_editing(
    model: OneStepModel,
    count: int,
    settings: TaskSettings,
    *,
    split: Split,
    batch_size: int,
    on_batch: Callable[[int], None] | None = None,
) -> EditScore:
    """Edit the first ``count`` scenes of a split; see `EditScore`."""
    changed, correct, limit, outside = 0, 0, 0, []
    for seeds in batched(split_seeds(split, count), batch_size):
        cases = [edit_case(seed) for seed in seeds]
        images = _drawn([case.scene for case in cases], model.image_size)
        results = model.edit(
            images,
            [model.say(case.wanted) for case in cases],
            [model.say(case.scene) for case in cases],
            generator=_noises(seeds),
            t=settings.edit_t,
            strength=settings.edit_strength,
            threshold=settings.edit_threshold,
            softness=settings.edit_softness,
        )
        for case, image, result in zip(cases, images, results, strict=True):
            found = find_objects(_pixels(result))
            changed += all(is_found(item, found) for item in case.recoloured())
            correct += shows(case.wanted, found)
            limit += shows(case.wanted, find_objects(render(case.wanted, model.image_size)))
            outside.append(_psnr(result, image, ~circles(case.recoloured(), model.image_size)))
        _tell(on_batch, len(seeds))
    return EditScore(changed / count, correct / count, limit / count, fmean(outside), count)


def score_inpainting(
    model: OneStepModel,
    count: int,
    settings: TaskSettings,
    *,
    split: Split,
    batch_size: int,
    on_batch: Callable[[int], None] | None = None,
) -> InpaintScore:
    """Fill ``count`` holes; see `InpaintScore`. The object is in no pixel that the model is given."""
    inside, limit, outside = 0, 0, []
    for part in batched(list(holes(split, count)), batch_size):
        images = _drawn([hole.without() for hole in part], model.image_size)
        masks = torch.zeros(len(part), 1, model.image_size, model.image_size)
        for mask, hole in zip(masks, part, strict=True):
            rows, columns = hole.box(model.image_size)
            mask[:, rows, columns] = 1.0
        results = model.inpaint(
            images,
            masks,
            [model.say(hole.scene) for hole in part],
            generator=_noises([hole.scene.seed for hole in part]),
            t=settings.inpaint_t,
        )
        for hole, image, mask, result in zip(part, images, masks, results, strict=True):
            inside += fills(hole, find_objects(_pixels(result)), model.image_size)
            limit += fills(hole, find_objects(render(hole.scene, model.image_size)), model.image_size)
            outside.append(_psnr(result, image, mask[0] == 0))
        _tell(on_batch, len(part))
    return InpaintScore(inside / len(outside), limit / len(outside), min(outside), len(outside))


def score_enlargement(
    model: OneStepModel,
    count: int,
    settings: TaskSettings,
    *,
    split: Split,
    batch_size: int,
    epd: Callable[[Tensor, Tensor], Tensor] | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> EnlargeScore:
    """Reduce the first ``count`` scenes of a split bicubically and enlarge them again; see `EnlargeScore`."""
    columns: dict[str, list[float]] = {"psnr": [], "psnr_bicubic": [], "epd": [], "epd_bicubic": []}
    for seeds in batched(split_seeds(split, count), batch_size):
        scenes = [sample_scene(seed) for seed in seeds]
        originals = _drawn(scenes, model.image_size)
        small = resize(originals, 1 / settings.scale).clamp(-1, 1)
        result = model.super_resolve(
            small,
            [model.say(scene) for scene in scenes],
            generator=_noises(seeds),
            scale=settings.scale,
            t=settings.enlarge_t,
            strength=settings.enlarge_strength,
        )
        for suffix, images in (("", result), ("_bicubic", resize(small, settings.scale).clamp(-1, 1))):
            everywhere = torch.ones(images.shape[-2:], dtype=torch.bool)
            columns["psnr" + suffix] += [_psnr(*pair, everywhere) for pair in zip(images, originals, strict=True)]
            if epd is not None:
                columns["epd" + suffix] += epd(images, originals).tolist()
        _tell(on_batch, len(seeds))
    figures = {name: fmean(values) if values else None for name, values in columns.items()}
    return EnlargeScore(**figures, scenes=count)  # type: ignore[arg-type]  # PSNR is always there


def _drawn(scenes: Sequence[Scene], size: int) -> Tensor:
    """Scenes as images (B, 3, S, S) in [-1, 1]."""
    from PIL import Image

    return torch.stack([to_tensor(Image.fromarray(render(scene, size))) for scene in scenes])


def _pixels(image: Tensor) -> NDArray[np.uint8]:
    return np.asarray(to_image(image))


def _noises(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def _psnr(image: Tensor, other: Tensor, where: Tensor) -> float:
    """Over the chosen pixels, in dB."""
    error = float((image - other).square()[:, where].mean())
    return PSNR_CAP if error == 0 else min(PSNR_CAP, 10 * math.log10(4 / error))


def _tell(on_batch: Callable[[int], None] | None, count: int) -> None:
    if on_batch is not None:
        on_batch(count)
