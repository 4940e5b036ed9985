"""``layton generate``: text to image with LaytonGen."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from generation.model.weight_types import Weights
from generation.sampling.choice import SamplingChoice, require_sampling
from layton.errors import UsageError
from layton.folder import write_json
from layton.options import require_least
from layton.progress import progress

if TYPE_CHECKING:
    from generation.model.layout import PlacedObject
    from generation.text.encoders import TextCut

_SLUG_LENGTH = 60
_TOLD_WORDS = 8
_SAMPLING = SamplingChoice()


def generate(
    prompt: list[str] | None = None,
    *,
    prompts: Path | None = None,
    out: Path = Path("generated"),
    model: str = "mini",
    tokenizer: str | None = None,
    decoder: str | None = None,
    steps: int | None = None,
    seed: int = 0,
    images_per_prompt: int = 1,
    sampling: SamplingChoice = _SAMPLING,
    layout: Path | None = None,
    unconditional: bool = False,
    weights: Weights | None = None,
    compile: bool = False,
    batch_size: int = 16,
    overwrite: bool = False,
    device: str | None = None,
    allow: list[str] | None = None,
    json: Path | None = None,
) -> None:
    """Draw images from prompts; the same prompt and seed give the same picture.

    Files are named by number, prompt and seed, such as 0000-a_red_circle-5.png.

    Args:
        prompt: what to draw; each prompt in quotation marks.
        prompts: a text file with a prompt on each line, drawn after those on the command line.
        out: folder for the PNG files; made if needed.
        model: embedded model or folder with a generator.
        tokenizer: its tokenizer, where it does not lie beside the generator.
        decoder: name of the code decoder; the tokenizer's own choice by default.
        steps: network evaluations of the decoder; its own number by default.
        seed: of the first image of each prompt; the following ones count up from it.
        images_per_prompt: how many of each prompt.
        sampling: how the model is sampled.
        layout: where objects shall stand, a JSON file such as [{"labels": ["star", "red"], "x": 0.3, "y": 0.5,
            "diameter": 0.25}], for every prompt; by default the model's own planner says it, if there is one.
        unconditional: accept an empty prompt, for pictures of anything.
        weights: of the model while it draws: bf16, or int8 on a CPU, to be quicker; by default as they are saved.
        compile: compile decoding first, which takes a quarter to half a minute: for many batches of the same size.
        batch_size: images drawn at once, each with its candidates; memory does not grow with the number of images.
        overwrite: replace pictures of the same names; without it they are an error, before anything is drawn.
        device: where to run; the accelerator if there is one.
        allow: dotted names, or their beginnings, of classes of your own that a saved part may name.
        json: write settings, times and files to this file as well.
    """
    import torch
    from PIL import Image

    from generation.drawing import LaytonGenDrawer
    from generation.model.layout import read_layout
    from generation.pipeline import MAX_IMAGES
    from layton.staging import require_free, staged

    require_least(1, {"images_per_prompt": images_per_prompt, "batch_size": batch_size, "steps": steps})
    require_least(0, {"seed": seed})
    require_sampling(sampling)
    wanted = _prompts(prompt or [], prompts, unconditional=unconditional)
    if len(wanted) * images_per_prompt > MAX_IMAGES:
        raise UsageError(f"at most {MAX_IMAGES} images at a time, got {len(wanted)} prompts times {images_per_prompt}")
    if layout is not None and sampling.no_layout:
        raise UsageError("give --layout or --no-layout, not both")
    placed = None if layout is None else read_layout(layout)
    seeds = range(seed, seed + images_per_prompt)
    images = [(words, each) for words in wanted for each in seeds]
    names = [picture_name(number, *image) for number, image in enumerate(images)]
    if not overwrite:
        require_free(out, names)
    started = time.perf_counter()
    draw = LaytonGenDrawer.load(
        model,
        tokenizer=tokenizer,
        decoder=decoder,
        num_steps=steps,
        sampling=sampling,
        weights=weights,
        compiled=compile,
        device=device,
        allow=allow or (),
    )
    loaded = time.perf_counter()
    _tell_unread(draw.pipeline.text_encoder.unread(wanted))
    told: list[Sequence[PlacedObject] | None] = []
    cut: dict[int, TextCut] = {}  # by prompt, whose images may lie in several batches
    batches = list(_batches(len(wanted), images_per_prompt, batch_size))
    with staged(out) as folder, progress(len(batches) * draw.pipeline.num_tokens, "generate") as bar:
        for which, part in batches:
            drawn = draw.draw(
                [wanted[number] for number in which],
                [torch.Generator().manual_seed(seed + each) for _ in which for each in part],
                images_per_prompt=len(part),
                layouts=None if placed is None else [placed] * len(which),
                callback=lambda _: bar.update(1),
            )
            cut |= {which[each.index]: replace(each, index=which[each.index]) for each in drawn.cut}
            for name, image in zip(names[len(told) :], drawn.images, strict=False):
                Image.fromarray(image).save(folder / name)
            told += drawn.layouts
    seconds = time.perf_counter() - loaded
    sys.stdout.write(f"{out}: {', '.join(names[:4])}{' ...' * (len(names) > 4)} in {seconds:.1f} s\n")
    if json is not None:
        times = {"loading": loaded - started, "drawing": seconds}
        settings = draw.settings(told=placed is not None)
        settings |= {"prompts": wanted, "seed": seed, "images_per_prompt": images_per_prompt}
        where = [None if each is None else [asdict(item) for item in each] for each in told]
        record = {"files": names, "prompts": [words for words, _ in images], "seeds": [each for _, each in images]}
        record |= {"layouts": where, "cut": [str(each) for each in cut.values()]}
        write_json(json, {"settings": settings, "seconds": times, **record})


def _prompts(given: Sequence[str], file: Path | None, *, unconditional: bool) -> list[str]:
    """What is to be drawn.

    Raises:
        UsageError: It is not said, or an empty prompt is not meant.
        ValueError: The file cannot be read, or holds no prompt.
    """
    from layton.data.prompts import PromptFile

    found = list(given)
    if file is not None and not file.exists():
        raise UsageError(f"no prompts file at {file}; a prompt itself is said without --prompts")
    if file is not None:
        source = PromptFile(str(file))
        found += [source.sample(number, seed=0)["caption"] for number in range(len(source))]
    if not found:
        raise UsageError("say what to draw: a prompt, or --prompts FILE")
    if not all(prompt.strip() for prompt in found) and not unconditional:
        raise UsageError("a prompt is empty: say what to draw, or --unconditional")
    return found


def _tell_unread(words: Sequence[str]) -> None:
    """Say on stderr which words are letters only to a text encoder of Scenes, or the picture of a cat is a riddle."""
    if words:
        some = ", ".join(words[:_TOLD_WORDS]) + ", ..." * (len(words) > _TOLD_WORDS)
        sys.stderr.write(f"layton: not in this model's vocabulary (that of Scenes: shapes, colours, places): {some}\n")


def _batches(num_prompts: int, images_per_prompt: int, batch_size: int) -> Iterator[tuple[range, range]]:
    """Prompts and images of each that are drawn together: some whole prompts, or a part of one."""
    together = max(1, batch_size // images_per_prompt)
    for first in range(0, num_prompts, together):
        for start in range(0, images_per_prompt, batch_size):
            prompts = range(first, min(first + together, num_prompts))
            yield prompts, range(start, min(start + batch_size, images_per_prompt))


def picture_name(number: int, prompt: str, seed: int) -> str:
    """File name of a picture: the same for the same three, and another one for any others.

    Args:
        number: Of the picture in its run.
        prompt: What was drawn; told in harmless characters, and by a hash too where these do not tell all of it.
        seed: Of the picture.
    """
    from layton.staging import safe_stem

    flat = prompt.replace("/", "_").replace("\\", "_")[:_SLUG_LENGTH]
    slug = safe_stem(f"{flat or 'empty'}.png")
    if "_" in prompt or slug != prompt.replace(" ", "_"):
        slug = f"{slug}-{hashlib.sha256(prompt.encode('utf-8', 'replace')).hexdigest()[:8]}"
    return f"{number:04d}-{slug}-{seed}.png"
