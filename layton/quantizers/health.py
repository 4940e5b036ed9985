"""Is the codebook alive? Usage and perplexity over the last tokens, and an alarm when it collapses."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from distill.schedules import working_dtype


class CodebookCollapseWarning(UserWarning):
    """The encoder writes the same few codes whatever the image is."""


@dataclass(frozen=True, slots=True)
class CodebookHealth:
    """State of a codebook over a window of recent tokens.

    Attributes:
        usage: Share of the V codes that occur in the window, in [0, 1].
        perplexity: exp of the entropy (nats) of the codes in the window, in [1, V]; 0 if the window is empty.
        num_tokens: Tokens in the window.
        collapsed: Whether the alarm is on.
    """

    usage: float
    perplexity: float
    num_tokens: int
    collapsed: bool


class HealthMonitor(nn.Module):
    """Remembers the last codes that a quantizer wrote in training and judges them.

    A batch of n codes is *poor* when its perplexity is below ``min_perplexity`` times min(n, V); the alarm is on after
    ``patience`` poor batches in a row and off after the first good one. It judges batches and not the window, so it
    rings as quickly for small batches as for large ones. Updating never synchronises with an accelerator.
    """

    codes: Tensor
    position: Tensor
    num_seen: Tensor
    num_poor: Tensor

    def __init__(
        self, vocab_size: int, *, window: int | None = None, min_perplexity: float = 0.01, patience: int = 20
    ) -> None:
        """Creates an empty window.

        Args:
            vocab_size: V.
            window: Tokens to remember; by default 4 V.
            min_perplexity: Poor below this share of the perplexity that the batch could have, in (0, 1).
            patience: Poor batches in a row that ring the alarm, >= 1.

        Raises:
            ValueError: On a value out of range.
        """
        super().__init__()
        window = 4 * vocab_size if window is None else window
        if vocab_size < 1 or window < 1 or patience < 1 or not 0 < min_perplexity < 1:
            raise ValueError(
                "vocab_size, window and patience must be >= 1 and min_perplexity in (0, 1), got "
                f"{vocab_size}, {window}, {patience}, {min_perplexity}"
            )
        self.vocab_size, self.min_perplexity, self.patience = vocab_size, min_perplexity, patience
        self._warned = False
        # not saved: a log of the recent past, rebuilt within a few steps of a resumed run
        self.register_buffer("codes", torch.zeros(window, dtype=torch.int32), persistent=False)
        self.register_buffer("position", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("num_seen", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("num_poor", torch.zeros((), dtype=torch.int64), persistent=False)

    @torch.no_grad()
    def update(self, codes: Tensor) -> None:
        """Adds the codes of one batch, any shape, integers in [0, V)."""
        flat = rearrange(codes, "... -> (...)")
        window = len(self.codes)
        batch_perplexity = perplexity(torch.bincount(flat, minlength=self.vocab_size))
        reachable = min(len(flat), self.vocab_size)
        # a batch that could not be richer than the bar cannot be judged by it
        poor = batch_perplexity < max(self.min_perplexity * reachable, 1.5)
        self.num_poor.copy_(torch.where(poor & (reachable > 1), self.num_poor + 1, 0))
        recent = flat[-window:].to(torch.int32)
        slots = (self.position + torch.arange(len(recent), device=flat.device)) % window
        self.codes[slots] = recent
        self.position.copy_((self.position + len(recent)) % window)
        self.num_seen.copy_((self.num_seen + len(recent)).clamp(max=window))

    def report(self) -> CodebookHealth:
        """Judges the window; warns with `CodebookCollapseWarning` once per collapse."""
        num_tokens = int(self.num_seen)
        counts = torch.bincount(self.codes[:num_tokens], minlength=self.vocab_size)
        health = CodebookHealth(
            usage=float((counts > 0).sum()) / self.vocab_size,
            perplexity=float(perplexity(counts)) if num_tokens else 0.0,
            num_tokens=num_tokens,
            collapsed=int(self.num_poor) >= self.patience,
        )
        if health.collapsed and not self._warned:
            warnings.warn(
                f"codebook collapse: {int(self.num_poor)} batches in a row used almost no codes "
                f"(perplexity {health.perplexity:.1f} of {self.vocab_size} over {num_tokens} tokens)",
                CodebookCollapseWarning,
                stacklevel=2,
            )
        self._warned = health.collapsed
        return health


def perplexity(counts: Tensor) -> Tensor:
    """exp(-sum p ln p) of p = counts / sum: counts (V,) >= 0 -> () in [1, V]; 1 if all are zero.

    In float64, on devices that have it.
    """
    p = counts.to(working_dtype(counts.device)) / counts.sum().clamp(min=1)
    return torch.exp(torch.special.entr(p).sum())
