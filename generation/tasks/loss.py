"""Cross-entropy of the next code, and the contrast of a true caption with a false one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from generation.model.vocabulary import LinearHead
from generation.sampling.shares import log_sum_exp, shares_of

_CPU_LOGITS, _LOGITS = 1 << 20, 1 << 26  # that are there at once: 4 MB stay in a processor's cache


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
    return mean_of_valid(flat.unflatten(0, codes.shape), valid)


def next_code_losses(head: LinearHead, codes: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each code, without ever having all logits.

    A batch of 16 images has 67 million logits; on a CPU they and their gradients take ten times as long as this.

    Args:
        head: Features (B, N, c) with the weights of the last layer.
        codes: (B, N) int64.
        label_smoothing: Share of the target that is spread over all codes, in [0, 1).

    Returns:
        (B, N) float32.

    Raises:
        ValueError: If ``label_smoothing`` is out of range.
    """
    _check_smoothing(label_smoothing)
    with torch.autocast(codes.device.type, enabled=False):
        features, weight = head.features.flatten(0, -2).float(), head.weight.float()
        bias = weight.new_zeros(len(weight)) if head.bias is None else head.bias.float()
        targets = codes.flatten()
        logits = (features * F.embedding(targets, weight)).sum(-1) + bias[targets]
        if label_smoothing:
            logits = torch.lerp(logits, features @ weight.mean(0) + bias.mean(), label_smoothing)
        total: Tensor = _LinearLogSumExp.apply(features, weight, bias)
    return (total - logits).view(codes.shape)


def mean_of_valid(losses: Tensor, valid: Tensor | None, weights: Tensor | None = None) -> Tensor:
    """Mean of the terms of valid images.

    Args:
        losses: (B, N).
        valid: (B,) or (B, N) bool or weights; None when all count.
        weights: (B, N) of the terms; what is divided by stays the number of valid terms. None when all are 1.

    Returns:
        (); 0 with zero gradients if nothing is valid.
    """
    if weights is not None:
        losses = losses * weights.to(losses.dtype)
    if valid is None:
        return losses.mean()
    counted = valid.to(losses.dtype)
    counted = counted[:, None].expand_as(losses) if counted.ndim == 1 else counted
    # a missing image may hold anything: 0 times NaN must not reach the sum
    return torch.where(counted > 0, losses * counted, 0.0).sum() / counted.sum().clamp_min(1e-8)


def contrast_loss(true: Tensor, contrary: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """How badly images tell their captions from false ones: mean of -log sigmoid(log p(x | true) - log p(x | false)).

    The pair's form of the contrastive alignment of autoregressive models (CCA, arXiv 2410.09347, without its reference
    model). What an image does not owe to its caption is in both terms and cancels, so that few images teach what one
    word changes: a number is worth one or two nats of the several hundred of an image.

    Args:
        true: (B, N) cross-entropies of codes given the true captions, in nats.
        contrary: (B, N) of the same codes given the false ones.
        valid: (B, N) bool; None when all codes count.

    Returns:
        (); log 2 when captions are not told apart.
    """
    surprise = true - contrary
    if valid is not None:
        surprise = torch.where(valid.bool(), surprise, 0.0)
    return F.softplus(surprise.sum(1)).mean()


class _LinearLogSumExp(torch.autograd.Function):
    """log sum exp over the outputs of a linear layer: features (R, c), weight (V, c), bias (V,) -> (R,).

    Rows go through in chunks, and the backward pass makes the logits again.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows = rows_at_once(weight)
        total = torch.cat([log_sum_exp(torch.addmm(bias, chunk, weight.T)) for chunk in features.split(rows)])
        ctx.save_for_backward(features, weight, bias, total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features, weight, bias, total = ctx.saved_tensors
        rows = rows_at_once(weight)
        to_features = torch.empty_like(features)
        to_weight, to_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        chunks = (tensor.split(rows) for tensor in (features, total, grads[0], to_features))
        for chunk, sums, grad, out in zip(*chunks, strict=True):
            shares = shares_of(torch.addmm(bias, chunk, weight.T), sums).mul_(grad[:, None])
            torch.mm(shares, weight, out=out)
            to_weight.addmm_(shares.T, chunk)
            to_bias.add_(shares.sum(0))
        return to_features, to_weight, to_bias


def rows_at_once(weight: Tensor) -> int:
    """How many rows of logits of a head (V, c) are made at once."""
    return max(1, (_CPU_LOGITS if weight.device.type == "cpu" else _LOGITS) // len(weight))


def _check_smoothing(label_smoothing: float) -> None:
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
