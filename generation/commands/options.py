"""Checks of options that can be made from the command line alone, before anything is loaded.

Wrong usage is told in one line and ends with exit status 2, as what jsonargparse refuses does. What only a model, a
file or a folder can tell (no such decoder, top-k above its vocabulary) is a failure: exit status 1.
"""

from __future__ import annotations

from collections.abc import Mapping

from layton.errors import UsageError


def require_least(least: int, values: Mapping[str, int | None]) -> None:
    """Stop unless every option that is given is at least ``least``.

    Args:
        least: The smallest value.
        values: By parameter name; None for options that are not given.

    Raises:
        UsageError: With the first option that is too small.
    """
    for name, value in values.items():
        if value is not None and value < least:
            raise UsageError(f"{_option(name)} must be at least {least}, got {value}")


def require_shares(values: Mapping[str, float]) -> None:
    """Stop unless every option is in [0, 1].

    Raises:
        UsageError: With the first option that is not.
    """
    for name, value in values.items():
        if not 0.0 <= value <= 1.0:
            raise UsageError(f"{_option(name)} must be in [0, 1], got {value}")


def require_sampling(
    *, guidance_scale: float | None, temperature: float | None, top_k: int | None, top_p: float | None
) -> None:
    """Stop unless these can be settings of LaytonGen; None stands for the model's own.

    Raises:
        UsageError: With what is out of range.
    """
    from generation.guidance import Guidance
    from generation.sampling import SamplingOptions

    try:
        SamplingOptions(1.0 if temperature is None else temperature, top_k or None, 1.0 if top_p is None else top_p)
        Guidance(1.0 if guidance_scale is None else guidance_scale)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
