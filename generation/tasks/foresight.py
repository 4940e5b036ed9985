"""What is still to come, asked of a generator while it is trained.

A code's cross-entropy says little about a plan: whether a second star must still be drawn changes a hundred codes by a
nat or two together. Asked for the plan itself, at every place, a small transformer learns to keep it. Nothing of it
remains in the exported model.

Legend: B images, N codes, D width, F questions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from generation.tasks.loss import mean_of_valid


@dataclass(frozen=True, slots=True)
class Foresight:
    """How a generator is asked what is still to come.

    Attributes:
        sizes: Number of possible answers of each question, F of them; `layton.scenes.AHEAD_SIZES` for scenes.
        block: Index of the transformer's block whose output is asked, so that the blocks behind can use the answer.
        weight: Of the answers' cross-entropy beside that of the codes.

    Raises:
        ValueError: If a number is out of range.
    """

    sizes: tuple[int, ...]
    block: int
    weight: float = 0.3

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not self.sizes or min(self.sizes) < 2 or self.block < 0 or self.weight <= 0:
            raise ValueError(f"need answers of two kinds or more, block >= 0 and weight > 0, got {self}")


class AnswerHead(nn.Module):
    """Several questions asked at each place, all answered by one linear layer.

    Args:
        width: D.
        sizes: Number of possible answers of each question.
    """

    def __init__(self, width: int, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.sizes = sizes
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.layer = nn.Linear(width, sum(sizes))

    def forward(self, hidden: Tensor, answers: Tensor, *, valid: Tensor | None = None) -> Tensor:
        """Cross-entropy of the answers, summed over the questions.

        Args:
            hidden: (B, N, D), what is known at each place.
            answers: (B, N, F) int64, the right answers there.
            valid: (B,) or (B, N) bool; None when all count.

        Returns:
            () float32.

        Raises:
            ValueError: If there are not so many answers.
        """
        if answers.shape != (*hidden.shape[:2], len(self.sizes)):
            raise ValueError(f"need answers {(*hidden.shape[:2], len(self.sizes))}, got {tuple(answers.shape)}")
        logits = self.layer(self.norm(hidden)).float().split(self.sizes, dim=-1)
        wrong = [
            F.cross_entropy(each.flatten(0, 1), answers[..., index].flatten(), reduction="none", ignore_index=-1)
            for index, each in enumerate(logits)
        ]
        return mean_of_valid(torch.stack(wrong).sum(0).view(answers.shape[:2]), valid)


@contextmanager
def output_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """A list into which the module puts what it returns, inside the context."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(output)

    handle = module.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()
