"""Where the committed run files are."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from pathlib import Path


def config_folders() -> tuple[Path, ...]:
    """``configs`` here, beside the packages (a checkout), and among what was installed; not all of them need exist."""
    schemes = (sysconfig.get_default_scheme(), sysconfig.get_preferred_scheme("user"))
    installed = (Path(sysconfig.get_path("data", scheme)) / "share" / "layton" / "configs" for scheme in schemes)
    return Path("configs"), Path(__file__).resolve().parents[2] / "configs", *installed


def found_configs(words: Sequence[str]) -> list[str]:
    """Words of a command line in which ``configs/...`` that is not here stands for what was installed."""
    return [_found(word) for word in words]


def _found(word: str) -> str:
    option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
    path = Path(value)
    if path.parts[:1] != ("configs",) or path.suffix != ".yaml" or path.is_file():
        return word
    places = (folder / Path(*path.parts[1:]) for folder in config_folders())
    return f"{option}{equals}{next((place for place in places if place.is_file()), path)}"
