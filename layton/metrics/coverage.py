"""Coverage: which share of the real images has a generated one near it (arXiv 2002.09797, equation 8).

A real image is covered when a generated one lies in the ball around it that reaches to its k-th nearest real
neighbour. A model that leaves out a part of the data loses coverage there, however good its images are: a measure of
diversity beside the Frechet distance.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1024  # rows of the distance matrix at once
_ROUNDING = 1e-12  # of float64 products, relative to the mean squared length of a feature


def coverage(real: Tensor, generated: Tensor, *, nearest: int = 5, chunk: int = _CHUNK) -> float:
    """Share of real samples whose k-nearest-neighbour ball holds a generated sample.

    The ball is closed: a generated sample at the distance of the k-th neighbour, up to rounding, covers.

    Args:
        real: (n, D) features.
        generated: (m, D) features.
        nearest: k, at least 1 and less than n; the paper's choice is 5.
        chunk: Rows of distances held in memory at once; no effect on the result.

    Returns:
        In [0, 1]. For equal distributions about ``1 - 2^-k``, so 0.97 for k = 5: not 1.

    Raises:
        ValueError: The shapes do not fit, a set is empty, k or ``chunk`` is out of range, or values are not finite.
    """
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1] or not len(generated):
        raise ValueError(f"expected (n, D) and (m, D), got {tuple(real.shape)} and {tuple(generated.shape)}")
    if not 1 <= nearest < len(real) or chunk < 1:
        raise ValueError(f"need 1 <= nearest < {len(real)} real samples and chunk >= 1, got {nearest} and {chunk}")
    real, generated = real.detach().cpu().double(), generated.detach().cpu().double()
    if not bool(real.isfinite().all() and generated.isfinite().all()):
        raise ValueError("features that are not finite")
    centre = real.mean(dim=0)  # squared distances are taken from products, which lose digits far from the origin
    real, generated = real - centre, generated - centre
    rounding = _ROUNDING * float(real.square().sum(dim=1).mean())
    covered = 0
    for start in range(0, len(real), chunk):
        rows = real[start : start + chunk]
        own = _squared_distances(rows, real)
        # each sample is its own nearest one: taken out by place, since duplicates are at distance 0 too
        own[torch.arange(len(rows)), torch.arange(start, start + len(rows))] = float("inf")
        reach = own.kthvalue(nearest, dim=1).values + rounding
        covered += int((_squared_distances(rows, generated).amin(dim=1) <= reach).sum())
    return covered / len(real)


def _squared_distances(rows: Tensor, others: Tensor) -> Tensor:
    """(r, D) and (m, D) -> (r, m) float64."""
    lengths = rows.square().sum(dim=1)[:, None] + others.square().sum(dim=1)[None, :]
    return (lengths - 2.0 * rows @ others.T).clamp(min=0.0)
