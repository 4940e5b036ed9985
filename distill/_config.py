"""Typed reads from a diffusers configuration, whose values arrive as ``object``.

Missing or null gives the default, anything of another kind raises ``ValueError``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, cast

T = TypeVar("T")


def read_float(config: Mapping[str, object], key: str, default: float) -> float:
    """The number under ``key``."""
    return float(_read(config, key, default, int | float, "a number"))


def read_int(config: Mapping[str, object], key: str, default: int) -> int:
    """The integer under ``key``."""
    return _read(config, key, default, int, "an integer")


def read_bool(config: Mapping[str, object], key: str, default: bool) -> bool:
    """The flag under ``key``."""
    return _read(config, key, default, bool, "true or false")


def read_str(config: Mapping[str, object], key: str, default: str) -> str:
    """The text under ``key``."""
    return _read(config, key, default, str, "text")


def _read(config: Mapping[str, object], key: str, default: T, kind: Any, told: str) -> T:
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{key} must be {told}, got {value!r}")
    return cast(T, value)
