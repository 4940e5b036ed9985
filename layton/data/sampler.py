"""Batches of positions of an endless sequence, shared out to ranks, resumable at any batch.

The whole state is one number, how many positions all ranks together have consumed, so it does not depend on the number
of workers, of ranks or on the batch size: a run may resume on another machine and neither repeats nor loses a sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils.data import Sampler


class ResumableSampler(Sampler[list[int]]):
    """A batch sampler over positions epoch * length + index.

    Step k of an epoch takes the next `batch_size * world_size` positions, `batch_size` in a row for each rank. The rest
    at the end of an epoch that fills no step is left out, as with drop_last. One pass of iteration goes to the end of
    the current epoch; the next one continues with the next epoch.

    Args:
        length: Positions in an epoch.
        batch_size: Positions for one rank in one step.
        rank: This process.
        world_size: Number of processes.

    Raises:
        ValueError: If the numbers do not fit, or an epoch is shorter than one step.
    """

    def __init__(self, length: int, batch_size: int, *, rank: int = 0, world_size: int = 1) -> None:
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"need batch_size >= 1 and 0 <= rank < world_size, got {batch_size}, {rank}, {world_size}")
        if length < batch_size * world_size:
            raise ValueError(
                f"{length} samples do not fill one step of {world_size} x {batch_size}: take a smaller batch "
                "(--data.init_args.batch_size) or more samples (of what is stored, three fifths are for training)"
            )
        self.length = length
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.consumed = 0

    @property
    def step_size(self) -> int:
        """Positions that all ranks together take in one step."""
        return self.batch_size * self.world_size

    def after(self, consumed: int) -> int:
        """Positions consumed after one more step: the next step's beginning, in the next epoch if this one is over.

        Args:
            consumed: Positions consumed before the step.
        """
        consumed += self.step_size
        return self.settle(consumed)

    def settle(self, consumed: int) -> int:
        """Pass over what is left of an epoch if it fills no step.

        Args:
            consumed: Positions consumed.
        """
        left = -consumed % self.length
        return consumed + left if left < self.step_size else consumed

    def __len__(self) -> int:
        """Steps in a whole epoch."""
        return self.length // self.step_size

    def __iter__(self) -> Iterator[list[int]]:
        """This rank's positions of each step to the end of the current epoch."""
        consumed = self.consumed
        end = (consumed // self.length + 1) * self.length
        while consumed < end:
            start = consumed + self.rank * self.batch_size
            consumed = self.after(consumed)
            yield list(range(start, start + self.batch_size))
        self.consumed = end

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a saved state, also of another batch size or number of ranks.

        Args:
            state_dict: ``consumed``, the positions consumed, and ``length``, that of the epoch.

        Raises:
            ValueError: If it belongs to an epoch of another length.
        """
        consumed, length = state_dict.get("consumed"), state_dict.get("length")
        if length != self.length or not isinstance(consumed, int) or consumed < 0:
            raise ValueError(f"data state {state_dict} does not belong to an epoch of {self.length} samples")
        self.consumed = self.settle(consumed)
