"""SceneEval's prompts: made from test seeds, written and read as GenEval's JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Final

from layton.folder import write_text
from layton.scenes.captions import CHINESE_PREFIXES, INVERSE, PREFIXES, Language, Wording, describe
from layton.scenes.layout import as_position, sample_scene
from layton.scenes.placed import placed_caption
from layton.scenes.splits import Split, is_unseen, split_seeds
from layton.scenes.world import TASKS, Scene, Task
from layton.sceneval.spec import Exclusion, PromptSpec, Requirement

PROMPT_PREFIX: Final = "a photo of "
# As in GenEval, these two tasks ask for shapes only. (Its counting and position prompts are colourless too; ours name
# colours, so that unseen combinations exist in four tasks instead of two.)
COLOURLESS_TASKS: Final[frozenset[Task]] = frozenset({"single_object", "two_object"})
_SEEDS_PER_TASK: Final = 1_000_000
_PATIENCE: Final = 200  # draws without a new prompt before one may be repeated (there are 8 single objects)


def spec_of_scene(scene: Scene, *, coloured: bool = True, swapped: bool = False, unseen: bool = False) -> PromptSpec:
    """The prompt that a scene fulfils, and its specification.

    Beyond GenEval's rules every task excludes one object more of each shape: "a star" is not two stars.

    Args:
        scene: a scene.
        coloured: whether colours are named and asked for.
        swapped: whether ``objects[1]`` is named first.
        unseen: the flag to record.

    Returns:
        The specification; ``prompt`` starts with "a photo of".
    """
    prompt = PROMPT_PREFIX + describe(scene, Wording(coloured=coloured, swapped=swapped))
    first = scene.objects[0]
    if scene.task in ("single_object", "colors", "counting"):
        colour = first.colour if coloured else None
        include: tuple[Requirement, ...] = (Requirement(first.shape, len(scene.objects), colour),)
    else:
        named = scene.objects[1::-1] if swapped else scene.objects[:2]
        subject, other = (Requirement(o.shape, 1, o.colour if coloured else None) for o in named)
        include = (subject, other)
        if scene.relation is not None:
            # GenEval lists the reference first and the object that stands somewhere second.
            relation = scene.relation if swapped else INVERSE[scene.relation]
            include = (other, Requirement(subject.shape, 1, subject.colour, relation, 0))
    exclude = tuple(Exclusion(item.shape, item.count + 1) for item in include)
    return PromptSpec(scene.task, include, exclude, prompt, unseen)


def spec_of_caption(scene: Scene, caption: str) -> PromptSpec:
    """What an image must show to fulfil a caption of a scene, however it is worded, in English or Chinese.

    Args:
        scene: a scene.
        caption: one of its captions, of `layton.scenes.captions` or `layton.data.sources.say`.

    Returns:
        The specification; its prompt is the caption.

    Raises:
        ValueError: if the caption is none of the scene's.
    """
    languages: tuple[tuple[Language, tuple[str, ...]], ...] = (("en", PREFIXES), ("zh", CHINESE_PREFIXES))
    for told in (scene, as_position(scene)):
        if told is None:
            continue
        for (language, prefixes), coloured, swapped in product(languages, (True, False), (False, True)):
            words = describe(told, Wording(language, coloured=coloured, swapped=swapped))
            if caption in [prefix + words for prefix in prefixes]:
                return replace(spec_of_scene(told, coloured=coloured, swapped=swapped), prompt=caption)
    raise ValueError(f"{caption!r} is no caption of scene {scene.seed}: {describe(scene, Wording())!r}")


def make_prompts(
    per_task: int, *, split: Split = "test", unseen_share: float = 0.2, places: bool = False
) -> list[PromptSpec]:
    """Draw prompts from a split's seeds, deterministically, without repeats while there are new ones.

    Args:
        per_task: prompts for each of the six tasks.
        split: whose seeds to use; reported figures use "test".
        unseen_share: in [0, 1]; part of the prompts of the coloured tasks that name unseen combinations.
        places: whether the same scenes are told by where their objects stand (`layton.scenes.placed`) instead, for
            models that learnt such prompts. What an image must show stays as it was.

    Returns:
        ``6 * per_task`` prompts, task by task.

    Raises:
        ValueError: if an argument is out of range, or unseen prompts are asked of training seeds.
    """
    if per_task < 1 or not 0 <= unseen_share <= 1:
        raise ValueError(f"need per_task >= 1 and unseen_share in 0..1, got {per_task} and {unseen_share}")
    if split == "train" and unseen_share > 0:
        raise ValueError("training seeds have no unseen combinations: pass unseen_share=0")
    prompts: list[PromptSpec] = []
    for number, task in enumerate(TASKS):
        unseen = 0 if task in COLOURLESS_TASKS else round(per_task * unseen_share)
        scenes = _draw(task, {False: per_task - unseen, True: unseen}, split, number * _SEEDS_PER_TASK)
        prompts += [replace(spec, prompt=placed_caption(scene)) if places else spec for scene, spec in scenes]
    return prompts


def _draw(task: Task, wanted: dict[bool, int], split: Split, offset: int) -> list[tuple[Scene, PromptSpec]]:
    coloured = task not in COLOURLESS_TASKS
    taken: dict[bool, list[tuple[Scene, PromptSpec]]] = {False: [], True: []}
    known: set[str] = set()
    idle = {False: 0, True: 0}
    for seed in split_seeds(split, _SEEDS_PER_TASK, offset=offset):
        if all(len(taken[flag]) >= wanted[flag] for flag in taken):
            break
        scene = sample_scene(seed, task=task)
        flag = coloured and is_unseen(scene)
        if len(taken[flag]) >= wanted[flag]:
            continue
        spec = spec_of_scene(scene, coloured=coloured, swapped=bool(seed % 2), unseen=flag)
        if spec.prompt in known and idle[flag] < _PATIENCE:
            idle[flag] += 1
            continue
        idle[flag] = 0
        known.add(spec.prompt)
        taken[flag].append((scene, spec))
    return taken[False] + taken[True]


def write_prompts(path: Path, prompts: Iterable[PromptSpec]) -> None:
    """Write a prompts file, one JSON object a line, whole or not at all."""
    write_text(path, "".join(prompt.to_json() + "\n" for prompt in prompts))


def read_prompts(path: Path) -> list[PromptSpec]:
    """Read a prompts file of ours or of GenEval's form; empty lines are skipped.

    Raises:
        ValueError: if a line is broken or speaks of other things than Scenes' shapes and colours; names the line.
        OSError: if the file cannot be read.
    """
    prompts: list[PromptSpec] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            prompts.append(PromptSpec.from_json(line))
        except (ValueError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return prompts
