"""Checks of LaytonGen's options beside those of `layton.commands.options`."""

from __future__ import annotations

from generation.weight_types import Weights as Weights  # for the commands
from layton.commands.options import require_least as require_least  # passed on
from layton.commands.options import require_shares as require_shares
from layton.errors import UsageError


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
