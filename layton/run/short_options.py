"""Short words for what everyone sets in ``layton fit``, and its help in a screenful."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from layton.data.stored import source_of
from layton.errors import UsageError
from layton.usage import plain_name

HELP = """usage: layton {command} --config RUN.yaml [--config OVERLAY.yaml] [--data DATA.yaml] [--images PLACE] [...]

{what}

  --config FILE       run file: the task, its parts, the trainer; later files over earlier ones (configs/README.md)
  --data FILE         data file: what it learns from (configs/data)
  --images PLACE      images of your own in place of the data file's: a folder, tar shards, or a table of Hugging Face's
                      datasets; three fifths train, one validates, one is for tests
  --trainer FILE      hardware: configs/trainer/cpu.yaml, gpu1.yaml, ddp.yaml, fsdp.yaml
  --run_dir DIR       checkpoints, grids, logs and, at the end, export/; default runs/NAME of the run file
{own}
  --batch_size N      images of one process and step
  --max_steps N       optimizer steps; a schedule of one cycle is as long
  --seed N            of everything that is random

Everything else of a run file is an option, too, for example
  --model.init_args.optimizer.init_args.lr=1e-4   --trainer.precision=bf16-mixed   --trainer.accumulate_grad_batches=4
`layton {command} --help all` lists Lightning's own options; `layton info --config RUN.yaml` says what a run takes.
"""
_WHAT = {
    "fit": "Trains a stage, and exports it at the end.",
    "validate": "Evaluates a stage on its validation split.",
    "test": "Evaluates a stage on its test split.",
}
_RESUME = "  --resume auto       go on from the newest checkpoint of the run folder, or from the one that is named"
_CHECKPOINT = "  --ckpt_path auto    the newest checkpoint of the run folder, or the one that is named"
_DATA, _IMAGES, _STEPS = "--data", "--images", "--max_steps"
_FOLDER_FILE = "configs/data/folder_256.yaml"
_FORMS = {
    "--batch_size": "--data.init_args.batch_size",
    "--seed": "--seed_everything",
    _STEPS: "--trainer.max_steps",
}
_SCHEDULER = "--model.init_args.lr_scheduler.init_args.total_steps"
MEANT = {
    "--lr": "--model.init_args.optimizer.init_args.lr",
    "--learning_rate": "--model.init_args.optimizer.init_args.lr",
    "--rank": "--model.init_args.adapter.rank",
    "--device": "--trainer.accelerator",
    "--devices": "--trainer.devices",
    "--precision": "--trainer.precision",
    "--epochs": "--trainer.max_epochs",
    "--workers": "--data.init_args.num_workers",
    "--num_workers": "--data.init_args.num_workers",
    "--out": "--run_dir",
    "--output": "--run_dir",
    "--output_dir": "--run_dir",
}
"""What other programs call options of these."""
SHORT = (_IMAGES, *_FORMS)
"""The short words, for those who look for a misspelt one."""


def short_help(command: str) -> str:
    """What ``layton COMMAND --help`` says."""
    own = _RESUME if command == "fit" else _CHECKPOINT
    return HELP.format(command=command, what=_WHAT[command], own=own)


def said_in_full(words: Sequence[str]) -> list[str]:
    """A command line of ``layton fit`` in which short words stand for what they mean.

    Raises:
        UsageError: One has no value, or there are no images where they are said to be.
    """
    short, rest = taken(words, SHORT)
    found = list(rest)
    for option, full in _FORMS.items():
        if option in short:
            found.append(f"{full}={short[option]}")
    if _STEPS in short and _ends_with_a_cycle(rest) and not any(word.startswith(_SCHEDULER) for word in rest):
        found.append(f"{_SCHEDULER}={short[_STEPS]}")
    if _IMAGES in short:
        found += _image_words(short[_IMAGES], has_data=any(word.partition("=")[0] == _DATA for word in rest))
    _require_data_file(rest)
    return found


def taken(words: Sequence[str], names: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """Some options of a command line with their values, and the other words.

    Raises:
        UsageError: One has no value.
    """
    short: dict[str, str] = {}
    rest: list[str] = []
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        option, equals, value = word.partition("=")
        name = plain_name(option)
        if name not in names:
            rest.append(word)
            continue
        if not equals:
            if not waiting or waiting[0].startswith("--"):
                raise UsageError(f"{option} needs a value")
            value = waiting.pop(0)
        short[name] = value
    return short, rest


def _image_words(place: str, *, has_data: bool) -> list[str]:
    where = str(Path(place).expanduser())
    if not any(character in where for character in "*?[{") and not Path(where).exists():
        raise UsageError(f"{_IMAGES} {place}: no such file or folder")
    class_path, settings = source_of(where)

    def source(role: str) -> str:
        return json.dumps([{"class_path": class_path, "init_args": {**settings, "split": role}}])

    roles = [f"--data.init_args.{role}={source(role)}" for role in ("train", "validation", "test")]
    return roles if has_data else [_DATA, _FOLDER_FILE, *roles]


def _require_data_file(words: Sequence[str]) -> None:
    for place, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option == _DATA:
            value = value if equals else next(iter(words[place + 1 :]), "")
            if Path(value).is_dir():
                raise UsageError(f"{_DATA} takes a data file, and {value} is a folder: {_IMAGES} takes one of images")


def _ends_with_a_cycle(words: Sequence[str]) -> bool:
    """Whether the learning rate of the run files goes through one cycle, whose length has to be said."""
    named = False
    for place, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option != "--config":
            continue
        parts = _model_parts(value if equals else next(iter(words[place + 1 :]), ""))
        if "lr_scheduler" in parts:
            scheduler = parts["lr_scheduler"]
            named = isinstance(scheduler, dict) and str(scheduler.get("class_path", "")).endswith(".OneCycleLR")
    return named


def _model_parts(text: str) -> dict[str, Any]:
    """The model's settings in a run file, or in what stands in its place; none where its parser will say why."""
    try:
        path = Path(text)
        found = yaml.safe_load(path.read_text(encoding="utf-8") if path.suffix else text)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    for name in ("model", "init_args"):
        found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}
