"""SceneEval's score: GenEval's form on the Scenes world. It is another scale than GenEval's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from layton.scenes.world import TASKS, Task
from layton.sceneval.checker import check
from layton.sceneval.folders import read_folders, write_folder
from layton.sceneval.spec import PromptSpec

Images = Sequence[NDArray[np.uint8]]
Generate = Callable[[Sequence[str], Sequence[int]], Images]

PROTOCOL: Final = (
    "SceneEval 1: Scenes prompts in GenEval's form, classical checker; per task mean over images, overall is the "
    "unweighted mean of the tasks; not comparable with GenEval"
)


@dataclass(frozen=True, slots=True)
class TaskScore:
    """One task's figures; all scores in [0, 1].

    Attributes:
        task: its tag.
        prompts: number of prompts.
        images: number of images.
        score: share of images that are correct.
        seen: the same for prompts of seen combinations, None without such prompts.
        unseen: the same for prompts of unseen combinations, None without such prompts.
    """

    task: Task
    prompts: int
    images: int
    score: float
    seen: float | None
    unseen: float | None


@dataclass(frozen=True, slots=True)
class SceneEvalReport:
    """A run's figures; all scores in [0, 1].

    Attributes:
        overall: unweighted mean of the task scores.
        any_correct: share of prompts with at least one correct image.
        seen: mean of the seen scores of the tasks that have both kinds, None without such a task.
        unseen: mean of the unseen scores of the same tasks.
        prompts: number of prompts.
        images: number of images.
        tasks: the tasks that occur, in GenEval's order.
        protocol: how the figures were made.
    """

    overall: float
    any_correct: float
    seen: float | None
    unseen: float | None
    prompts: int
    images: int
    tasks: tuple[TaskScore, ...]
    protocol: str = PROTOCOL

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they are written to JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class PromptVerdict:
    """Whether each image of a prompt is correct."""

    spec: PromptSpec
    correct: tuple[bool, ...]


def verdict(spec: PromptSpec, images: Images) -> PromptVerdict:
    """Check all images of a prompt, uint8 (H, W, 3) each."""
    return PromptVerdict(spec, tuple(check(image, spec).correct for image in images))


def summarise(verdicts: Iterable[PromptVerdict]) -> SceneEvalReport:
    """Add verdicts up.

    Args:
        verdicts: one for each prompt; prompts without images count nowhere.

    Returns:
        The report.

    Raises:
        ValueError: if there is no image at all.
    """
    judged = [v for v in verdicts if v.correct]
    if not judged:
        raise ValueError("no image to score")
    tasks = tuple(_task_score(task, group) for task in TASKS if (group := [v for v in judged if v.spec.task == task]))
    both = [(t.seen, t.unseen) for t in tasks if t.seen is not None and t.unseen is not None]
    return SceneEvalReport(
        overall=_mean([t.score for t in tasks]),
        any_correct=_mean([any(v.correct) for v in judged]),
        seen=_mean([seen for seen, _ in both]) if both else None,
        unseen=_mean([unseen for _, unseen in both]) if both else None,
        prompts=len(judged),
        images=sum(len(v.correct) for v in judged),
        tasks=tasks,
    )


def _task_score(task: Task, group: list[PromptVerdict]) -> TaskScore:
    every = [ok for v in group for ok in v.correct]
    seen = [ok for v in group if not v.spec.unseen for ok in v.correct]
    unseen = [ok for v in group if v.spec.unseen for ok in v.correct]
    return TaskScore(
        task,
        prompts=len(group),
        images=len(every),
        score=_mean(every),
        seen=_mean(seen) if seen else None,
        unseen=_mean(unseen) if unseen else None,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def score_folder(out: Path) -> SceneEvalReport:
    """Score a run in GenEval's folder layout.

    Raises:
        ValueError: if there is nothing to score or a folder's metadata is broken.
        OSError: if a file cannot be read.
    """
    return summarise(verdict(folder.spec, folder.images()) for folder in read_folders(out))


def run_sceneval(
    generate: Generate,
    prompts: Sequence[PromptSpec],
    images_per_prompt: int = 4,
    out_dir: Path | None = None,
    *,
    batch_size: int = 16,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> SceneEvalReport:
    """Generate images for all prompts and score them.

    Args:
        generate: ``(texts, seeds) -> images``, one uint8 (H, W, 3) image for each text and seed. An image must depend
            on its own text and seed only; then the score does not depend on ``batch_size``.
        prompts: the prompts.
        images_per_prompt: images for each (GenEval takes 4).
        out_dir: where to keep the images in GenEval's folder layout; None keeps nothing.
        batch_size: most images asked for at once.
        seed: image ``k`` of prompt ``i`` gets ``seed + i * images_per_prompt + k``.
        on_progress: called with (images done, images in all).

    Returns:
        The report.

    Raises:
        ValueError: if a count is not positive, there are no prompts, ``out_dir`` holds other files, or ``generate``
            returns a wrong number of images.
    """
    if images_per_prompt < 1 or batch_size < 1 or not prompts:
        raise ValueError(
            f"need prompts, images_per_prompt and batch_size of at least 1, "
            f"got {len(prompts)}, {images_per_prompt} and {batch_size}"
        )
    if out_dir is not None and out_dir.is_dir() and any(out_dir.iterdir()):
        raise ValueError(f"{out_dir} holds other files, which would be scored with these images")
    total = len(prompts) * images_per_prompt
    verdicts: list[PromptVerdict] = []
    waiting: list[NDArray[np.uint8]] = []
    for start in range(0, total, batch_size):
        numbers = range(start, min(start + batch_size, total))
        images = generate([prompts[n // images_per_prompt].prompt for n in numbers], [seed + n for n in numbers])
        if len(images) != len(numbers):
            raise ValueError(f"asked for {len(numbers)} images, got {len(images)}")
        waiting += [np.asarray(image) for image in images]
        while len(waiting) >= images_per_prompt:
            ready, waiting = waiting[:images_per_prompt], waiting[images_per_prompt:]
            spec = prompts[len(verdicts)]
            if out_dir is not None:
                write_folder(out_dir, len(verdicts), spec, ready)
            verdicts.append(verdict(spec, ready))
        if on_progress is not None:
            on_progress(numbers.stop, total)
    return summarise(verdicts)
