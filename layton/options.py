"""Checks of options that can be made from the command line alone, before anything is loaded.

Wrong usage is told in one line and ends with exit status 2, as what jsonargparse refuses does. What only a model, a
file or a folder can tell (no such decoder, top-k above its vocabulary) is a failure: exit status 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from layton.errors import UsageError


def require_least(least: int, values: Mapping[str, int | float | None]) -> None:
    """Stop unless every option that is given is at least ``least``, and fits into 63 bits as seeds and counts must.

    Args:
        least: The smallest value.
        values: By parameter name; None for options that are not given.

    Raises:
        UsageError: With the first option that is too small or too large.
    """
    for name, value in values.items():
        if value is not None and value < least:
            raise UsageError(f"{_option(name)} must be at least {least}, got {value}")
        if value is not None and value >= 2**63:
            raise UsageError(f"{_option(name)} must be below 2^63, got {value}")


def require_shares(values: Mapping[str, float]) -> None:
    """Stop unless every option is in [0, 1].

    Raises:
        UsageError: With the first option that is not.
    """
    for name, value in values.items():
        if not 0.0 <= value <= 1.0:
            raise UsageError(f"{_option(name)} must be in [0, 1], got {value}")


def refuse_given(options: Mapping[str, object], whose: str) -> None:
    """Stop if an option is given that would do nothing.

    Args:
        options: By parameter name; None for those that are not given.
        whose: What they belong to, in words.

    Raises:
        UsageError: With all that are given.
    """
    given = [_option(name) for name, value in options.items() if value is not None]
    if given:
        raise UsageError(f"{', '.join(given)}: {whose}")


def changed_options(given: Any, usual: Any) -> dict[str, object]:
    """What differs between two dataclasses of options, by name, as `refuse_given` wants it."""
    pairs = {field.name: getattr(given, field.name) for field in fields(usual)}
    return {name: value for name, value in pairs.items() if value != getattr(usual, name)}


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
