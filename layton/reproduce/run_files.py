"""A committed run file becomes the run file of one stage: other folders, and what the budget decides."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from layton.folder import write_text


def read_run(path: Path, *overlays: Path | None) -> dict[str, Any]:
    """A run file, with others laid over it one after another: their values win, their lists replace.

    Raises:
        ValueError: A file is missing or is no mapping.
    """
    run = _read(path)
    for overlay in overlays:
        run = run if overlay is None else _merged(run, _read(overlay))
    return run


def assign(run: dict[str, Any], option: str, value: Any) -> None:
    """Set one value by its dotted name; numbers in the name count places in a list.

    Raises:
        ValueError: There is no such place in the run file.
    """
    *path, last = option.split(".")
    place: Any = run
    try:
        for name in path:
            place = place[int(name)] if isinstance(place, list) else place[name]
        if isinstance(place, list):
            place[int(last)] = value
        else:
            place[last] = value
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"the run file has no place for {option!r}") from error


def batch_size_of(run: Mapping[str, Any]) -> int:
    """Samples in a training batch, as the data of a run file say.

    Raises:
        ValueError: They do not say it.
    """
    try:
        return int(run["data"]["init_args"]["batch_size"])
    except (KeyError, TypeError) as error:
        raise ValueError("the run file must say data.init_args.batch_size: phases depend on it") from error


def write_run(run: Mapping[str, Any], path: Path) -> None:
    """Write a run file, whole or not at all."""
    write_text(path, yaml.safe_dump(dict(run), sort_keys=False, allow_unicode=True))


def _read(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no run file")
    return found


def _merged(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merged(result[key], value) if both else value
    return result
