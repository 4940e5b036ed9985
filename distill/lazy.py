"""Names of a package that are imported when they are first asked for (PEP 562): importing the package stays light."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from types import ModuleType


def lazily(package: str, places: Mapping[str, str]) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package.

    Args:
        package: Its ``__name__``.
        places: Public names, and the modules within the package that have them.
    """

    def find(name: str) -> object:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{places[name]}"), name)

    def names() -> list[str]:
        there = vars(sys.modules[package]).items()
        return sorted({name for name, value in there if name[0] == "_" or isinstance(value, ModuleType)} | set(places))

    return find, names
