"""GenEval (arXiv 2310.11513): any model's images in the official folder layout, and the official scorer's results.

Layout (github.com/djghosh13/geneval): ``OUT/00000/metadata.jsonl`` with the prompt's line, and
``OUT/00000/samples/0000.png`` to ``0003.png``. The scorer (Mask2Former and CLIP) is a program of its own; it reads this
folder, passes over everything whose name is not all digits, and writes a results file that `summarise_results` reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from layton.data.threads import batched
from layton.folder import write_atomically, write_text
from layton.ranks import num_ranks, own_rank, said_by_first
from layton.reproduce.evaluation import Draw

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
OFFICIAL_PROMPTS = 553
IMAGES_PER_PROMPT = 4
SEED = 42  # the reference script sets it anew for every prompt
SETTINGS_NAME = "settings.json"


@dataclass(frozen=True, slots=True)
class GenEvalPrompt:
    """One line of a prompts file.

    Attributes:
        prompt: The text.
        tag: The task.
        line: The whole line as it was read, for the scorer.
    """

    prompt: str
    tag: str
    line: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class GenEvalScores:
    """What the official scorer found; scores in [0, 1].

    Attributes:
        overall: Unweighted mean of the task scores.
        tasks: Share of right images by task.
        images: Number of images.
        correct_images: Share of images that are right.
        prompts: Number of prompts.
        correct_prompts: Share of prompts with a right image at least.
        complete: Whether these are the six tasks with 553 prompts and 4 images each, as published scores have.
    """

    overall: float
    tasks: Mapping[str, float]
    images: int
    correct_images: float
    prompts: int
    correct_prompts: float
    complete: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def read_prompts(path: Path) -> list[GenEvalPrompt]:
    """Read a prompts file in the form of ``evaluation_metadata.jsonl``; empty lines are skipped.

    Raises:
        ValueError: If a line is no JSON object with ``tag``, ``include`` and ``prompt``; names the line.
        OSError: If the file cannot be read.
    """
    prompts: list[GenEvalPrompt] = []
    for number, text in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        if not isinstance(line, dict) or not isinstance(line.get("include"), list):
            raise ValueError(f"{path}, line {number}: no object with a list 'include'")
        prompt, tag = line.get("prompt"), line.get("tag")
        if not isinstance(prompt, str) or not isinstance(tag, str):
            raise ValueError(f"{path}, line {number}: prompt and tag must be text, got {prompt!r} and {tag!r}")
        prompts.append(GenEvalPrompt(prompt, tag, line))
    if not prompts:
        raise ValueError(f"{path} holds no prompts")
    return prompts


def run_geneval(
    draw: Draw,
    prompts: Sequence[GenEvalPrompt],
    out: Path,
    *,
    settings: Mapping[str, Any],
    images_per_prompt: int = IMAGES_PER_PROMPT,
    seed: int = SEED,
    on_progress: Callable[[int], object] | None = None,
) -> int:
    """Draw all prompts into the official layout; run again, it goes on where it was interrupted.

    Where several processes do it together, ``draw`` gives each of them all images, and the first one writes.

    Args:
        draw: ``(texts, seeds) -> images``, uint8 (H, W, 3) each.
        prompts: What to draw.
        out: Folder to write.
        settings: Every setting that decides the pictures; written to ``settings.json``.
        images_per_prompt: Images for each.
        seed: Image k of every prompt gets ``seed + k``.
        on_progress: Told how many images are done with.

    Returns:
        Number of images that were drawn now.

    Raises:
        ValueError: If the folder holds images of other settings, or a number is below 1.
    """
    if images_per_prompt < 1 or seed < 0:
        raise ValueError(f"images_per_prompt must be >= 1 and seed >= 0, got {images_per_prompt} and {seed}")
    record = {**settings, "images_per_prompt": images_per_prompt, "seed": seed, "prompts": len(prompts)}
    if own_rank() == 0:
        _claim(out, record)
    names = [f"{number:04d}.png" for number in range(images_per_prompt)]
    lines = [json.dumps(dict(prompt.line)) for prompt in prompts]
    folders = [out / f"{index:05d}" for index in range(len(prompts))]
    left = said_by_first([n for n, line in enumerate(lines) if not _is_done(folders[n], line, names)])
    if on_progress is not None:
        on_progress((len(prompts) - len(left)) * images_per_prompt)
    seeds = [seed + number for number in range(images_per_prompt)]
    for group in batched(left, num_ranks()):
        texts = [prompts[n].prompt for n in group for _ in seeds]
        images = draw(texts, seeds * len(group))
        if len(images) != len(texts):
            raise ValueError(f"asked for {len(texts)} images, got {len(images)}")
        for place, n in enumerate(group if own_rank() == 0 else ()):
            for name, image in zip(names, images[place * images_per_prompt :], strict=False):
                write_atomically(folders[n] / "samples" / name, partial(Image.fromarray(image).save, format="PNG"))
            write_text(folders[n] / "metadata.jsonl", lines[n] + "\n")
        if on_progress is not None:
            on_progress(len(texts))
    return len(left) * images_per_prompt


def summarise_results(path: Path) -> GenEvalScores:
    """Sum up the file that the official ``evaluate_images.py`` writes, as its ``summary_scores.py`` does.

    Args:
        path: JSON lines with ``tag``, ``correct`` and ``metadata``, one for each image.

    Raises:
        ValueError: If a line is something else, or there is none.
        OSError: If the file cannot be read.
    """
    by_task: dict[str, list[bool]] = {}
    by_prompt: dict[str, list[bool]] = {}
    for number, text in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            tag, correct, metadata = line["tag"], line["correct"], line["metadata"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: no result of GenEval ({error!r})") from error
        if not isinstance(tag, str) or not isinstance(correct, bool):
            raise ValueError(f"{path}, line {number}: tag must be text and correct true or false")
        by_task.setdefault(tag, []).append(correct)
        by_prompt.setdefault(metadata if isinstance(metadata, str) else json.dumps(metadata), []).append(correct)
    if not by_task:
        raise ValueError(f"{path} holds no results")
    tasks = {tag: sum(right) / len(right) for tag, right in by_task.items()}
    images = [right for group in by_task.values() for right in group]
    ordered = {tag: tasks[tag] for tag in (*TASKS, *sorted(set(tasks) - set(TASKS))) if tag in tasks}
    return GenEvalScores(
        overall=sum(tasks.values()) / len(tasks),
        tasks=ordered,
        images=len(images),
        correct_images=sum(images) / len(images),
        prompts=len(by_prompt),
        correct_prompts=sum(any(group) for group in by_prompt.values()) / len(by_prompt),
        complete=set(tasks) == set(TASKS) and len(images) == OFFICIAL_PROMPTS * IMAGES_PER_PROMPT,
    )


def _claim(out: Path, record: Mapping[str, Any]) -> None:
    """Write the settings of a run, or make sure that they are those of the run that was begun here."""
    path = out / SETTINGS_NAME
    text = json.dumps(dict(record), indent=2, sort_keys=True, allow_nan=False) + "\n"
    if not path.is_file():
        if out.is_dir() and any(folder.name.isdigit() for folder in out.iterdir()):
            raise ValueError(f"{out} holds images of a run without {SETTINGS_NAME}: take another folder")
        write_text(path, text)
        return
    try:
        stored = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): take another folder") from error
    wanted = json.loads(text)
    if stored != wanted:
        names = sorted(name for name in {*stored, *wanted} if stored.get(name) != wanted.get(name))
        changes = "; ".join(f"{name}: stored {stored.get(name)!r}, wanted {wanted.get(name)!r}" for name in names)
        raise ValueError(f"{out} was drawn with other settings ({changes}); take another folder")


def _is_done(folder: Path, line: str, names: Sequence[str]) -> bool:
    metadata = folder / "metadata.jsonl"
    if not metadata.is_file():
        return False
    if metadata.read_text(encoding="utf-8").strip() != line:
        raise ValueError(f"{folder} holds another prompt: the prompts file is not the one this run was begun with")
    return all((folder / "samples" / name).is_file() for name in names)
