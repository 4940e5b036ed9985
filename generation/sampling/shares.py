"""Probabilities from logits, without the numbers that a processor is slow with.

Of 16,384 codes most are so unlikely that float32 holds exp of their logits as denormal numbers, with which CPUs
reckon up to a hundred times more slowly. So differences are cut at -60 first: a share of 1e-26 of the whole is less
than rounding leaves of it, and all sums stay what they were.

Legend: R rows, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

_RARE = -60.0


def shares_of(logits: Tensor, total: Tensor) -> Tensor:
    """Probabilities of logits.

    Args:
        logits: (R, V).
        total: (R,), their `log_sum_exp`.

    Returns:
        (R, V), at least exp(-60).
    """
    return (logits - total[:, None]).clamp_min_(_RARE).exp_()


def log_sum_exp(logits: Tensor) -> Tensor:
    """Log sum exp of each row (R, V) of finite logits: (R,)."""
    largest = logits.amax(dim=1)
    return shares_of(logits, largest).sum(dim=1).log_().add_(largest)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of the distribution of each row (R, V) of logits, in nats: (R,)."""
    logs = (logits - log_sum_exp(logits)[:, None]).clamp_min_(_RARE)
    return logs.exp().mul_(logs).sum(dim=1).neg_()
