"""Nearest-code search in bounded memory: which of V codes is closest to each of n features.

Scores are computed for a few features at a time, and the best code is found in two levels (the maximum of every
group of codes, then the winner inside the best group), because on a CPU a plain argmax over 16,384 scores costs
several times more than the matrix product that makes them.
"""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from layton.precision import exact_float32

Metric = Literal["cosine", "euclidean"]

_CPU_BYTES = 2 * 2**20  # the block of scores stays in the second-level cache; larger blocks are slower, measured
_ACCELERATOR_BYTES = 64 * 2**20  # large enough to fill an accelerator, still independent of n
_GROUP = 128  # codes per group of the two-level maximum


@torch.no_grad()
def nearest_codes(
    features: Tensor, codebook: Tensor, *, metric: Metric = "cosine", chunk: int | None = None, check: bool = True
) -> Tensor:
    """Index of the nearest code of every feature; of equally near codes, the first.

    Needs O(chunk * V) temporary memory, whatever n is: 2 MiB on a CPU unless ``chunk`` says otherwise. Always fp32,
    under autocast too.

    Args:
        features: (n, d) vectors; for ``"cosine"`` their length does not matter.
        codebook: (V, d) codes; for ``"cosine"`` they are taken as they are, so they should have unit length.
        metric: ``"cosine"`` takes the largest dot product, ``"euclidean"`` the smallest distance.
        chunk: Features per block; by default as many as fit the memory given above.
        check: Look for NaN and infinity in ``features`` (one synchronisation on an accelerator).

    Returns:
        (n,) int64 indices in [0, V).

    Raises:
        ValueError: On shapes that do not fit, an empty codebook, ``chunk`` < 1, or features that are not finite.
    """
    if features.ndim != 2 or codebook.ndim != 2 or features.shape[1] != codebook.shape[1] or not len(codebook):
        raise ValueError(
            f"features (n, d) and codebook (V, d) do not fit: {tuple(features.shape)} and {tuple(codebook.shape)}"
        )
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be >= 1, got {chunk}")
    if metric not in ("cosine", "euclidean"):
        raise ValueError(f"metric must be 'cosine' or 'euclidean', got {metric!r}")
    features = features.detach().float()
    if check and not bool(torch.isfinite(features).all()):
        raise ValueError(f"{_count_bad(features)} of {len(features)} features are NaN or infinite")
    with torch.autocast(device_type=features.device.type, enabled=False), exact_float32():
        return _search(features, codebook.detach().float(), metric=metric, chunk=chunk)


def _search(features: Tensor, codebook: Tensor, *, metric: Metric, chunk: int | None) -> Tensor:
    num_features, num_codes = len(features), len(codebook)
    rows = chunk or _default_chunk(num_codes, features.device)
    rows = min(rows, max(num_features, 1))
    weight = codebook.t().contiguous()  # (d, V)
    # argmin |x - e|^2 = argmax x.e - |e|^2 / 2: one bias turns the distance into a dot product
    bias = -0.5 * codebook.square().sum(dim=1) if metric == "euclidean" else None
    codes = torch.empty(num_features, dtype=torch.int64, device=features.device)
    scores = torch.empty(rows, num_codes, device=features.device)
    for start in range(0, num_features, rows):
        block = features[start : start + rows]
        out = scores[: len(block)]
        if bias is None:
            torch.mm(block, weight, out=out)
        else:
            torch.addmm(bias, block, weight, out=out)
        codes[start : start + rows] = _first_argmax(out)
    return codes


def _first_argmax(scores: Tensor) -> Tensor:
    """Column of the first maximum of every row, by groups: scores (n, V) -> (n,)."""
    grouped_codes = scores.shape[1] // _GROUP * _GROUP
    if scores.shape[1] <= 2 * _GROUP or grouped_codes != scores.shape[1]:
        return scores.argmax(dim=1)
    grouped = rearrange(scores, "n (g k) -> n g k", k=_GROUP)
    group = grouped.amax(dim=2).argmax(dim=1)  # the first group that holds the maximum
    rows = torch.arange(len(scores), device=scores.device)
    return group * _GROUP + grouped[rows, group].argmax(dim=1)


def _default_chunk(num_codes: int, device: torch.device) -> int:
    budget = _CPU_BYTES if device.type == "cpu" else _ACCELERATOR_BYTES
    return max(1, budget // (4 * num_codes))


def _count_bad(features: Tensor) -> int:
    return int((~torch.isfinite(features)).any(dim=1).sum())
