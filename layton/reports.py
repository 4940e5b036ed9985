"""Figures of a command as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layton.folder import write_atomically


def write_json(path: Path | str, figures: Mapping[str, Any]) -> None:
    """Write figures atomically: the file is absent, the previous one, or whole.

    Args:
        path: target file; its folder is made.
        figures: plain data; numbers that are not finite are refused, for JSON has none.

    Raises:
        ValueError: a value that JSON cannot hold.
    """
    try:
        text = json.dumps(figures, indent=2, allow_nan=False, default=_plain)
    except TypeError as error:
        raise ValueError(f"cannot write {path}: {error}") from error

    def write(part: Path) -> None:
        part.write_text(text + "\n", encoding="utf-8")

    write_atomically(Path(path), write)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # tensors, arrays and their scalars
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not plain data")
