"""Typed reads from a diffusers configuration, whose values arrive as ``object``."""

from __future__ import annotations

from collections.abc import Mapping


def read_float(config: Mapping[str, object], key: str, default: float) -> float:
    """The number under ``key``; missing or null gives ``default``; anything else raises ``ValueError``."""
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{key} must be a number, got {value!r}")
    return float(value)


def read_int(config: Mapping[str, object], key: str, default: int) -> int:
    """The integer under ``key``; missing or null gives ``default``; anything else raises ``ValueError``."""
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{key} must be an integer, got {value!r}")
    return value


def read_bool(config: Mapping[str, object], key: str, default: bool) -> bool:
    """The flag under ``key``; missing or null gives ``default``; anything else raises ``ValueError``."""
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ValueError(f"{key} must be true or false, got {value!r}")
    return value


def read_str(config: Mapping[str, object], key: str, default: str) -> str:
    """The text under ``key``; missing or null gives ``default``; anything else raises ``ValueError``."""
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, str):
        raise ValueError(f"{key} must be text, got {value!r}")
    return value
