"""A first look at run files before anything they name is imported: a run file is data, not a program."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from layton.errors import UsageError

ALLOWED_MODULES = (
    "distill",
    "layton",
    "generation",
    "torch.nn",
    "torch.optim",
    "torch.utils.data",
    "torch._C._nn",
    "torchvision",
    "lightning.pytorch",
    "lightning.fabric",
    "lightning.pytorch.cli.ReduceLROnPlateau",
)
_REFUSED_MODULES = ("*", "lightning.pytorch.cli", "lightning.fabric.utilities", "layton.run", "layton.cli")
SCENES_SOURCE = "layton.data.sources.ScenesSource"
SCENE_CAPTIONS = "layton.data.prompts.SceneCaptions"
SCENE_CASES = "layton.distillation.task_sources.SceneCases"
MAX_BYTES = 1_000_000
MAX_DEPTH = 64
MAX_ALIASES = 64
_NULLS = ("null", "None")
_CLASS_KEYS = ("class_path", "_class_path")
_SUFFIXES = (".yaml", ".yml", ".json")
_FILE_OPTIONS = ("-c", "--config", "--data", "--model", "--trainer")
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def allow_modules(names: Iterable[str] = ()) -> tuple[str, ...]:
    """Let jsonargparse import only this library, torch's and torchvision's parts, and lightning.

    Everything else is refused before it is imported, also on the command line and in checkpoints.

    Args:
        names: more modules or dotted names to allow, from the caller; they are imported, so that saved parts may name
            their classes, too (`layton.folder.resolve_class`).

    Returns:
        All that is allowed.
    """
    from jsonargparse import set_parsing_settings

    names = tuple(names)
    for name in names:
        with suppress(ImportError, ValueError):  # it may be a class, or the beginning of a name
            importlib.import_module(name)
    allowed = (*ALLOWED_MODULES, *names)
    set_parsing_settings(
        config_read_mode_fsspec_enabled=False,  # run files are local files
        import_path_denylist=list(_REFUSED_MODULES),
        import_path_allowlist=list(allowed),
    )
    return allowed


def nulls_as_files(words: Sequence[str]) -> list[str]:
    """Words of a command line in which ``--a.init_args.b.init_args.c=null`` is said as a run file says it.

    jsonargparse takes null for a setting of a class, but not for one of a class within a class (4.53).
    """
    found: list[str] = []
    rest = iter(words)
    for word in rest:
        option, equals, value = word.partition("=")
        if not option.startswith("--") or option.count(".init_args.") < 2:
            found.append(word)
            continue
        if not equals:
            value = next(rest, "")
        if value in _NULLS:
            nested: Any = None
            for name in reversed(option[2:].split(".")):
                nested = {name: nested}
            found += ["--config", json.dumps(nested)]
        else:
            found += [word] if equals else [option, *([value] if value else [])]
    return found


def refused_class_paths(value: Any, *, allowed: Iterable[str]) -> list[str]:
    """Class paths in parsed configuration, such as the hyperparameters of a checkpoint, that are not allowed.

    Args:
        value: nested plain data.
        allowed: as for `check_run_files`.

    Returns:
        The offending names.
    """
    prefixes = tuple(allowed)
    if isinstance(value, Mapping):
        named = [item for key, item in value.items() if key in _CLASS_KEYS and isinstance(item, str)]
        refused = [name for name in named if "." in name and not _within(name, prefixes)]
        return refused + [name for item in value.values() for name in refused_class_paths(item, allowed=prefixes)]
    if isinstance(value, list | tuple):
        return [name for item in value for name in refused_class_paths(item, allowed=prefixes)]
    return []


def check_run_files(words: Sequence[str], *, allowed: Iterable[str]) -> list[Path]:
    """Check every run file named on a command line, and the files that these name, beside themselves.

    Args:
        words: command line; any word, or value after ``=``, that is an existing YAML or JSON file counts, and of any
            name what stands behind an option that takes a file; text in the place of a file is checked as that.
        allowed: modules and dotted names that ``class_path`` may name, with all below them.

    Returns:
        The files checked.

    Raises:
        UsageError: a file is too large, too deep or not YAML, has a tag such as ``!!python/name``, or names a class
            outside ``allowed``.
    """
    prefixes = tuple(allowed)
    named = [Path(part) for word in words for part in (word, word.partition("=")[2]) if part]
    waiting = [path for each in named if (path := _run_file(each)) is not None]
    for value in _given_as_files(words):
        path = _run_file(Path(value), any_name=True)
        if path is not None:
            waiting.append(path)
        else:
            _check_scalars(_scalars(value, told="the command line"), prefixes, told="the command line")
    seen: list[Path] = []
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.append(path)
        for _, value in _check_scalars(_scalars(_content(path), told=str(path)), prefixes, told=str(path)):
            nested = _run_file(path.parent / value) if value.endswith(_SUFFIXES) else None
            if nested is not None:
                waiting.append(nested)
    return seen


def _given_as_files(words: Sequence[str]) -> list[str]:
    """What stands behind options that take a run file."""
    pairs = [word.partition("=")[::2] for word in words]
    following = [*words[1:], ""]
    return [value or after for (name, value), after in zip(pairs, following, strict=True) if name in _FILE_OPTIONS]


def _check_scalars(
    scalars: Iterable[tuple[str, str]], prefixes: tuple[str, ...], *, told: str
) -> list[tuple[str, str]]:
    found = list(scalars)
    for key, value in found:
        if key in _CLASS_KEYS and "." in value and not _within(value, prefixes):
            raise UsageError(
                f"{told}: class_path {value!r} is not in an allowed module ({', '.join(prefixes)}); "
                f"--allow {value.partition('.')[0]} would allow one of your own"
            )
    return found


def _run_file(path: Path, *, any_name: bool = False) -> Path | None:
    try:
        return path.resolve() if (any_name or path.suffix in _SUFFIXES) and path.is_file() else None
    except (OSError, ValueError):  # too long, or a NUL inside: no file
        return None


def _within(name: str, prefixes: Iterable[str]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def _content(path: Path) -> str:
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise UsageError(f"{path} has {size} bytes; a run file has at most {MAX_BYTES}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not YAML: {error}") from error


def _scalars(text: str, *, told: str) -> Iterator[tuple[str, str]]:
    """Every scalar of a text with the key it stands under; keys themselves come with an empty key."""
    aliases = 0
    anchors: list[bool] = []  # per open mapping or sequence whether it has an anchor
    stack: list[str | None] = []  # per open mapping the key that waits for its value; "" in sequences
    mappings: list[bool] = []
    try:
        for event in yaml.parse(text, Loader=_LOADER):
            tag = getattr(event, "tag", None)
            if tag is not None and (not tag.startswith("tag:yaml.org,2002:") or "python" in tag):
                raise UsageError(f"{told}: tag {tag!r} is not allowed in a run file")
            aliases += isinstance(event, yaml.AliasEvent)
            if isinstance(event, yaml.AliasEvent) and any(anchors):
                raise UsageError(f"{told}: an alias within something that has an anchor itself, as bombs have")
            if len(stack) > MAX_DEPTH or aliases > MAX_ALIASES:
                raise UsageError(f"{told} is nested deeper than {MAX_DEPTH} or has more than {MAX_ALIASES} aliases")
            if isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
                stack.pop()
                mappings.pop()
                anchors.pop()
                _value_done(stack, mappings)
            elif isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
                mappings.append(isinstance(event, yaml.MappingStartEvent))
                anchors.append(event.anchor is not None)
                stack.append(None if mappings[-1] else "")
            elif isinstance(event, yaml.ScalarEvent) and stack and mappings[-1] and stack[-1] is None:
                stack[-1] = event.value
            elif isinstance(event, yaml.ScalarEvent | yaml.AliasEvent):
                if isinstance(event, yaml.ScalarEvent):
                    yield (stack[-1] or "") if stack else "", event.value
                _value_done(stack, mappings)
    except yaml.YAMLError as error:
        raise UsageError(f"{told} is not YAML: {' '.join(str(error).split())}") from error


def _value_done(stack: list[str | None], mappings: list[bool]) -> None:
    if stack and mappings[-1]:
        stack[-1] = None


def moved(value: Any, places: Mapping[str, Path]) -> Any:
    """Plain data in which paths that begin with one of the keys lead into the folder there instead."""
    if isinstance(value, dict):
        return {key: moved(item, places) for key, item in value.items()}
    if isinstance(value, list):
        return [moved(item, places) for item in value]
    if isinstance(value, str):
        for start in sorted(places, key=len, reverse=True):
            if value == start or value.startswith(start + "/"):
                return str(places[start]) + value[len(start) :]
    return value


def set_scenes(value: Any, *, size: int | None, places: bool) -> None:
    """Fit every source of Scenes in a run file to a teacher, in place.

    Args:
        value: The run file, or a part of it.
        size: At which they render, in pixels; None for their own.
        places: Whether captions shall say where objects stand (`layton.scenes.placed`); else they stay as they are.
    """
    if isinstance(value, list):
        for item in value:
            set_scenes(item, size=size, places=places)
    elif isinstance(value, dict):
        if value.get("class_path") in (SCENES_SOURCE, SCENE_CAPTIONS, SCENE_CASES):
            options = value.setdefault("init_args", {})
            options |= {"size": size} if size is not None and value["class_path"] != SCENE_CAPTIONS else {}
            options |= {"places": 1.0} if places else {}
        for item in value.values():
            set_scenes(item, size=size, places=places)
