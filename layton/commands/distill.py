"""The arguments of ``layton distill``: short names for what everyone sets, in front of ``layton fit``."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml  # type: ignore[import-untyped]

from layton.assets import find_pipeline
from layton.data.stored import source_of
from layton.errors import UsageError
from layton.run.files import moved, set_scenes
from layton.run.short_options import MEANT, taken
from layton.usage import did_you_mean, plain_name

HELP = """usage: layton distill METHOD [--pipeline FOLDER] [--prompts FILE] [--run_dir DIR] [--max_steps N] [OVERRIDES]

Distils a diffusers pipeline folder (Stable Diffusion 1.x, 2.x, XL, 3, FLUX) to a student of few steps.
METHOD is one of: {methods}.

  --pipeline FOLDER   the teacher, and its text encoders and autoencoder; also ORG/NAME of the hub's local cache
  --prompts FILE      train on these prompts, one a line, in place of captions of Scenes (not lcm, scott, progressive);
                      a fifth of them is kept for validation, a fifth for tests
  --images PLACE      train on these captioned images, a folder, tar shards or a table of Hugging Face's datasets, in
                      place of rendered Scenes (methods that learn from pictures: lcm, scott, progressive)
  --pairs N           how many pairs the teacher makes beforehand (reflow, one_step, hipa)
  --run_dir DIR       checkpoints, grids, logs and, at the end, export/; default runs/METHOD
  --max_steps N       optimizer steps of the student
  --batch_size N      samples of one process and step
  --resume auto       continue from the newest checkpoint of the run folder

Everything else is as for `layton fit` on configs/distill/METHOD.yaml, for example
  --model.init_args.adapter.rank=16     --model.init_args.adapter=null (all weights)
  --seed 1                              --model.init_args.optimizer.init_args.lr=1e-4
  --trainer.precision=bf16-mixed        --data configs/data/scenes_prompts.yaml
"""
LATENT_DATA = "layton.ldm.latent_data.LatentDataModule"
PAIRS = "layton.distillation.pair_data.TeacherPairs"
CAPTIONS = "layton.data.prompts.SceneCaptions"
PICTURE_PAIRS = "layton.distillation.task_pairs.TaskPairs"
_LATENT_SIZE = "--model.init_args.latent_size"
_FLUX_SIZE = 128  # h = w; its configuration names none (diffusers: FluxPipeline.default_sample_size)
_TEACHER = ("latent_size", "network_guidance", "negative_prompt")  # of the task and of pairs alike
_SOLVER, _RULE = "--model.init_args.method.init_args.solver", ("name", "num_steps", "guidance_scale")
_ALPHA = "--model.init_args.adapter.alpha"
_RANK, _SHARE = "--model.init_args.adapter.rank", "--model.init_args.adapter_share"
_PAIRS = "--pairs"
_ROLES = ("train", "validation")
_MODELS_PIPELINE = "--model.init_args.pipeline"
_SHORT = ("--pipeline", "--prompts", "--images", "--pairs")  # beside those of `layton fit`


def fit_arguments(run_file: Path, words: Sequence[str]) -> list[str]:
    """The command line of ``layton fit`` for one of ``layton distill``.

    Args:
        run_file: Of the method.
        words: What stands after the method.

    Raises:
        UsageError: A short option has no value, no such folder or file, or prompts for a method that needs pictures, or
            the reverse.
    """
    run, method = yaml.safe_load(run_file.read_text(encoding="utf-8")), run_file.stem
    short, rest = _take_short(words)
    told = [*rest, f"{_PAIRS}={_number(_PAIRS, short[_PAIRS])}"] if _PAIRS in short else rest
    if _PAIRS in short and _first_source(run).get("class_path") != PAIRS:
        raise UsageError(f"{method} takes no pairs that a teacher makes beforehand: {_PAIRS} has no meaning")
    needs_pictures = _learns_from_pictures(run) and not _has_data(rest)
    arguments = ["--config", str(run_file)]
    parts = ("model",) if _has_data(rest) or "--prompts" in short else ("model", "data")
    if "--pipeline" in short:
        folder = find_pipeline(short["--pipeline"])
        size = picture_size(folder, latent_size=_value_of(_LATENT_SIZE, rest)) if needs_pictures else None
        drop = _ROLES if "--images" in short else ()
        arguments += _moved_arguments(run, folder, parts=parts, size=size, words=told, drop=drop)
    elif "data" in parts:
        arguments += _told_arguments(run, told)
    if "--images" in short:
        arguments += _image_arguments(short, method, run, rest)
    elif "--pipeline" in short and "data" in parts:
        _tell_of_scenes(run)
    if "--prompts" in short:
        if needs_pictures:
            raise UsageError(
                f"{method} learns from pictures, not from prompts alone: give --images or --data in their place"
            )
        arguments += _prompt_arguments(short["--prompts"], run, folder=short.get("--pipeline"), words=told)
    if _value_of(_RANK, rest) is not None and _value_of(_SHARE, rest) is None:
        arguments += [f"{_SHARE}=null"]  # a rank that is asked for is the rank, whatever its share of the parameters
    if (rank := _value_of(_RANK, rest)) is not None and _value_of(_ALPHA, rest) is None and _has_scale_of_one(run):
        arguments += [f"{_ALPHA}={rank}"]
    return arguments + rest


def check_words(run_file: Path, words: Sequence[str]) -> None:
    """Find a misspelt option, and miss a teacher, before anything is looked at.

    Args:
        run_file: Of the method.
        words: What stands after the method.

    Raises:
        UsageError: An option is unknown; or no teacher is named, and the folder that the run file names is not there.
    """
    _require_known(_take_short(words)[1])
    place = Path(yaml.safe_load(run_file.read_text(encoding="utf-8"))["model"]["init_args"]["pipeline"])
    named = ("--pipeline", _MODELS_PIPELINE, "--config")  # the last may be laid over it
    if not place.is_dir() and not any(word.partition("=")[0] in named for word in words):
        raise UsageError(f"no teacher at {place}: name one by --pipeline FOLDER (the embedded one is mini)")


def _moved_arguments(
    run: Mapping[str, Any],
    folder: Path,
    *,
    parts: Sequence[str],
    size: int | None,
    words: Sequence[str],
    drop: Sequence[str] = (),
) -> list[str]:
    """Changes that lead a run file's pipeline, and whatever else it takes from that folder, to another folder.

    Scenes are rendered at ``size``, if one is given, and their captions are such as the pipeline hears. Pairs are made
    as the words say of the teacher. Options in ``drop`` are left alone.
    """
    places = {run["model"]["init_args"]["pipeline"]: folder}
    hears = hears_guidance(folder)
    if hears:
        sys.stderr.write("layton: this network hears its guidance: no classifier-free guidance goes on top of it\n")
    arguments = ["--model.init_args.reference_guidance=1.0"] if hears else []
    told = "data" in parts and not drop and hears_places(folder)
    for part in parts:
        for name, value in run.get(part, {}).get("init_args", {}).items():
            found = moved(value, places)
            set_scenes(found, size=size, places=told)
            found = _unguided({name: found})[name] if hears else found
            found = _told(found, words) if (part, name) == ("data", "train") else found
            if found != value and name not in drop:
                text = found if isinstance(found, str) else json.dumps(found)
                arguments.append(f"--{part}.init_args.{name}={text}")
    return arguments


def _told_arguments(run: Mapping[str, Any], words: Sequence[str]) -> list[str]:
    """The change of a run file's training data that words about the teacher ask for; none for other data than pairs."""
    value = run.get("data", {}).get("init_args", {}).get("train")
    found = _told(value, words)
    return [] if found == value else [f"--data.init_args.train={json.dumps(found)}"]


def _told(sources: Any, words: Sequence[str]) -> Any:
    """Sources of which those that a teacher makes are made as options of the run say of it."""
    if not isinstance(sources, list):
        return sources
    given = {name: _value_of(f"--model.init_args.{name}", words) for name in _TEACHER}
    rule = {name: _value_of(f"{_SOLVER}.{name}", words) for name in _RULE}
    changes = {name: yaml.safe_load(value) for name, value in given.items() if value is not None}
    if (count := _value_of(_PAIRS, words)) is not None:
        changes["num_pairs"] = int(count)
    solver = {name: yaml.safe_load(value) for name, value in rule.items() if value is not None}

    def changed(source: Any) -> Any:
        if not isinstance(source, dict) or source.get("class_path") != PAIRS:
            return source
        settings = {**source["init_args"], **changes}
        said = settings.get("prompts")
        if (
            count is not None and isinstance(said, dict) and said.get("class_path") == CAPTIONS
        ):  # there is no end of them
            captions = said.get("init_args", {})
            length = max(int(count), captions.get("length", 0))
            settings["prompts"] = {**said, "init_args": {**captions, "length": length}}
        return {**source, "init_args": {**settings, "solver": {**settings.get("solver", {}), **solver}}}

    return [changed(source) for source in sources]


def hears_places(folder: Path) -> bool:
    """Whether a pipeline folder's text encoder has learnt where objects stand; said on stderr if so."""
    from layton.ldm import text

    try:
        found = text.hears_places(folder)
    except (OSError, ValueError):
        return False  # whoever loads the pipeline will tell why
    if found:
        sys.stderr.write("layton: this pipeline hears places: captions of Scenes say where objects stand\n")
    return found


def picture_size(folder: Path, *, latent_size: str | None = None) -> int | None:
    """Side in pixels of what a pipeline folder makes by default, or with another h = w of its latents.

    None where its files do not say: whoever loads them will tell why.
    """
    try:
        network = next(folder / name for name in ("unet", "transformer") if (folder / name).is_dir())
        side = latent_size or _config(network).get("sample_size") or _FLUX_SIZE
        return int(side) * 2 ** (len(_config(folder / "vae")["block_out_channels"]) - 1)
    except (StopIteration, OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _config(part: Path) -> dict[str, Any]:
    return cast("dict[str, Any]", json.loads((part / "config.json").read_text(encoding="utf-8")))


def hears_guidance(folder: Path) -> bool:
    """Whether a pipeline folder's network is told its guidance scale, as FLUX dev's is."""
    try:
        return bool(_config(folder / "transformer").get("guidance_embeds"))
    except (OSError, ValueError, AttributeError):
        return False


def _unguided(value: Any) -> Any:
    """Parts of a run file with every scale of classifier-free guidance at 1, which is none."""
    if isinstance(value, list):
        return [_unguided(item) for item in value]
    if not isinstance(value, dict):
        return value
    plain = {"guidance_scale": 1.0, "reference_guidance": 1.0, "guidance_range": [1.0, 1.0]}
    return {name: plain.get(name, _unguided(item)) for name, item in value.items()}


def _value_of(option: str, words: Sequence[str]) -> str | None:
    """The value of an option in words that Lightning's command line will read, of which the last one counts."""
    found = None
    for number, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == option:
            found = value if equals else next(iter(words[number + 1 :]), None)
    return found


def _number(option: str, value: str) -> int:
    if not value.isdigit() or int(value) < 1:
        raise UsageError(f"{option} must be a number of at least 1, got {value}")
    return int(value)


def _take_short(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    # what else comes from the model's pipeline folder moves, too
    moved_words = [
        f"--pipeline{word.removeprefix(_MODELS_PIPELINE)}" if word.partition("=")[0] == _MODELS_PIPELINE else word
        for word in words
    ]
    return taken(moved_words, _SHORT)


def _require_known(words: Sequence[str]) -> None:
    """Find a misspelt option here, where the short ones are known as well."""
    options = [plain_name(word.partition("=")[0]) for word in words if word.startswith("--")]
    if not options:
        return
    from layton.run.training import run_options

    known = run_options()
    for option in options:
        if not any(option == name or option.startswith(f"{name}.") for name in known):
            near = did_you_mean(option, [*_SHORT, *known], meant=MEANT)
            raise UsageError(f"no option {option}{near}; `layton distill --help` says what there is")


def _prompt_arguments(file: str, run: Mapping[str, Any], *, folder: str | None, words: Sequence[str]) -> list[str]:
    path = Path(file).expanduser()
    if not path.is_file():
        raise UsageError(f"no prompts file at {file}")

    def source(split: str) -> dict[str, Any]:
        kind = "layton.data.prompts.PromptFile"
        return {"class_path": kind, "init_args": {"path": str(path), "split": split}}

    train = source("train")
    first = _first_source(run)
    if first.get("class_path") == PAIRS:  # pairs are still made once, of these prompts
        if folder is not None:
            teacher = find_pipeline(folder)
            first = moved(first, {run["model"]["init_args"]["pipeline"]: teacher})
            first = _unguided(first) if hears_guidance(teacher) else first
        own = {"prompts": train, "folder": f"{first['init_args']['folder']}_{path.stem}"}
        (train,) = _told([{**first, "init_args": {**first["init_args"], **own}}], words)
    return [
        "--data=layton.data.module.ImageDataModule",
        f"--data.init_args.train={json.dumps([train], default=str)}",
        f"--data.init_args.validation={json.dumps([source('validation')])}",
    ]


def _image_arguments(short: Mapping[str, str], method: str, run: Mapping[str, Any], words: Sequence[str]) -> list[str]:
    """The change to a run file's data that takes captioned images in place of Scenes, cut to the pipeline's size."""
    if run["data"].get("class_path") != LATENT_DATA or "--prompts" in short or _has_data(words):
        raise UsageError(
            f"--images is for methods that learn from pictures, without --prompts or --data; {method} was asked"
        )
    folder = find_pipeline(short.get("--pipeline", run["model"]["init_args"]["pipeline"]))
    size = picture_size(folder, latent_size=_value_of(_LATENT_SIZE, words))
    if size is None:
        raise UsageError(f"{folder} does not say how large its pictures are: give {_LATENT_SIZE}")
    class_path, where = source_of(str(Path(short["--images"]).expanduser()))
    fitted = {"class_path": "layton.data.transforms.Fit", "init_args": {"size": size}}
    return [
        f"--data.init_args.{role}="
        + json.dumps([{"class_path": class_path, "init_args": {**where, "split": role, "transform": fitted}}])
        for role in _ROLES
    ]


def _tell_of_scenes(run: Mapping[str, Any]) -> None:
    """Say on stderr that the data are rendered, which few who bring a pipeline of their own want."""
    first = str(_first_source(run))
    if "ScenesSource" in first or "SceneCa" in first:
        own = "--images PLACE" if "ScenesSource" in first else "--prompts FILE"
        sys.stderr.write(f"layton: trains on the embedded world's Scenes; {own} or --data takes your own\n")


def _learns_from_pictures(run: Any) -> bool:
    """Whether a run file's data are pictures, or pairs of them."""
    found = run.get("data", {}) if isinstance(run, dict) else {}
    if not isinstance(found, dict):
        return False
    return found.get("class_path") == LATENT_DATA or _first_source(run).get("class_path") == PICTURE_PAIRS


def _has_scale_of_one(run: Mapping[str, Any]) -> bool:
    """Whether a run file's LoRA has alpha = rank, as one has whose rank follows from its share of the parameters."""
    options = run["model"]["init_args"]
    adapter = options.get("adapter") or {}
    return bool(options.get("adapter_share") or (adapter.get("rank") and adapter.get("rank") == adapter.get("alpha")))


def _first_source(run: Any) -> dict[str, Any]:
    """The first training source of a run file; empty if it names none."""
    sources = run.get("data", {}).get("init_args", {}).get("train")
    first = sources[0] if isinstance(sources, list) and sources else sources
    return first if isinstance(first, dict) else {}


def _has_data(words: Sequence[str]) -> bool:
    return any(word == "--data" or word.startswith("--data=") for word in words)
