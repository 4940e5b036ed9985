"""Checks of LaytonGen's options beside those of `layton.commands.options`."""

from __future__ import annotations

from generation.choice import SamplingChoice
from generation.weight_types import Weights as Weights  # for the commands
from layton.commands.options import require_least as require_least  # passed on
from layton.commands.options import require_shares as require_shares
from layton.errors import UsageError


def require_sampling(choice: SamplingChoice) -> None:
    """Stop unless these can be settings of LaytonGen.

    Raises:
        UsageError: With what is out of range.
    """
    from generation.generator import SamplingDefaults

    try:
        choice.over(SamplingDefaults())
    except ValueError as error:
        raise UsageError(str(error)) from error
