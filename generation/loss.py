"""Cross-entropy of the next code."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def next_code_loss(
    logits: Tensor, codes: Tensor, *, valid: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Mean cross-entropy over the codes of valid images (LlamaGen: missing images have weight 0).

    Args:
        logits: (B, N, V).
        codes: (B, N) int64.
        valid: (B,) or (B, N) bool or weights; None when all count.
        label_smoothing: Share of the target that is spread over all codes, in [0, 1).

    Returns:
        () float32; 0 with zero gradients if nothing is valid.

    Raises:
        ValueError: If ``label_smoothing`` is out of range.
    """
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    flat = F.cross_entropy(
        logits.flatten(0, 1).float(), codes.flatten(), reduction="none", label_smoothing=label_smoothing
    )
    losses = flat.unflatten(0, codes.shape)
    if valid is None:
        return losses.mean()
    weights = valid.to(losses.dtype)
    weights = weights[:, None].expand_as(losses) if weights.ndim == 1 else weights
    # a missing image may hold anything: 0 times NaN must not reach the sum
    return torch.where(weights > 0, losses * weights, 0.0).sum() / weights.sum().clamp_min(1e-8)
