"""Cross-entropy of the next code."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from generation.vocabulary import LinearHead

_IGNORED = -100


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
    _check_smoothing(label_smoothing)
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


def next_code_loss_in_chunks(
    head: LinearHead,
    codes: Tensor,
    *,
    valid: Tensor | None = None,
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """`next_code_loss` of the head's logits, which are never all there at once (torch's ``linear_cross_entropy``).

    A batch of 16 images has 67 million logits; on a CPU they and their gradients take ten times as long as this.

    Args:
        head: Features (B, N, c) with the weights of the last layer.
        codes: (B, N) int64.
        valid: (B,) or (B, N) bool; None when all count.
        weights: (B, N) of the codes' terms, of few different values; the sum is still divided by the number of codes.
            None when all are 1.
        label_smoothing: Share of the target that is spread over all codes, in [0, 1).

    Returns:
        () float32; 0 with zero gradients if nothing is valid.

    Raises:
        ValueError: If ``label_smoothing`` is out of range.
    """
    _check_smoothing(label_smoothing)
    if not hasattr(F, "linear_cross_entropy"):  # an older torch
        if weights is not None:
            raise ValueError("weighted codes need a torch that has linear_cross_entropy")
        return next_code_loss(F.linear(*head), codes, valid=valid, label_smoothing=label_smoothing)
    targets = codes
    if valid is not None:
        counted = valid.bool()[:, None].expand_as(codes) if valid.ndim == 1 else valid.bool()
        targets = codes.masked_fill(~counted, _IGNORED)
    if weights is None:
        total = _summed(head, targets, label_smoothing)
    else:
        total = head.features.new_zeros((), dtype=torch.float32)
        for weight in weights.unique():
            chosen = weights == weight
            part = LinearHead(head.features[chosen], head.weight, head.bias)
            total = total + weight * _summed(part, targets[chosen], label_smoothing)
    return total / (targets != _IGNORED).sum().clamp_min(1)


def _summed(head: LinearHead, targets: Tensor, label_smoothing: float) -> Tensor:
    """Sum of the terms of targets (...), those that are ignored left out."""
    with torch.autocast(targets.device.type, enabled=False):
        total: Tensor = F.linear_cross_entropy(
            head.features.flatten(0, -2).float(),
            head.weight.float(),
            targets.flatten(),
            linear_bias=None if head.bias is None else head.bias.float(),
            reduction="sum",
            ignore_index=_IGNORED,
            label_smoothing=label_smoothing,
            options=None if label_smoothing else torch.nn.LinearCrossEntropyOptions(),  # chunks know no smoothing
        )
    return total


def _check_smoothing(label_smoothing: float) -> None:
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
