"""Loaders: batches from positions, with exact resume and an account of broken images across workers.

`ResumableLoader` is stateful in the sense of Lightning's fit loop: `state_dict` after n batches, then `load_state_dict`
in a new process, gives batch n + 1 and all that follow, with another number of workers or ranks, too. It counts the
batches handed out, not those that workers have prepared ahead.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Sampler
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from layton.data.bad import BadImages
from layton.data.mixing import MixedSource
from layton.data.sampler import ResumableSampler

_FREE = ("consumed", "step_size")  # of a saved state: what a run may go on with otherwise


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Stack tensors, list everything else; reasons for broken images are joined under "bad".

    Args:
        samples: Flat samples with the same names, "bad" apart.

    Returns:
        One dictionary: tensors (B, ...), lists of length B, and "bad", a flat list of strings.

    Raises:
        ValueError: If the samples have different names or shapes.
    """
    names = [name for name in samples[0] if name != "bad"]
    batch: dict[str, Any] = {"bad": [reason for sample in samples for reason in sample.get("bad", [])]}
    for sample in samples:
        if odd := set(names) ^ (sample.keys() - {"bad"}):
            raise ValueError(f"some samples have {min(odd)!r} and some have not; mixed sources must agree")
    for name in names:
        values = [sample[name] for sample in samples]
        if isinstance(values[0], Tensor):
            shapes = {tuple(value.shape) for value in values}
            if len(shapes) > 1:
                raise ValueError(f"{name!r} comes in shapes {sorted(shapes)}; mixed sources must agree on the size")
            batch[name] = torch.stack(values)
        else:
            batch[name] = values
    return batch


class BatchLoader:
    """What both loaders share: an inner DataLoader, and broken images reported by workers counted here.

    Args:
        mixed: Samples by position.
        batches: Yields the positions of each batch.
        num_workers: Worker processes; 0 loads in this one.
        bad: Where broken images are recorded.
        pin_memory: Page-locked memory, for GPUs.
    """

    def __init__(
        self,
        mixed: MixedSource,
        batches: Sampler[list[int]],
        *,
        num_workers: int = 0,
        bad: BadImages | None = None,
        pin_memory: bool = False,
    ) -> None:
        self.mixed = mixed
        self.batches = batches
        self.bad = bad if bad is not None else BadImages()
        self._loader: DataLoader[Any] = DataLoader(
            mixed,
            batch_sampler=batches,
            num_workers=num_workers,
            collate_fn=collate,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            generator=torch.Generator(),  # the global generator is training's: a resumed run must find it untouched
        )

    def close(self) -> None:
        """End the worker processes; iterated again, new ones are begun.

        Workers are kept from one epoch to the next. Left to the garbage collector they take ten seconds each to end:
        it takes the queues first by which they are told.
        """
        iterator = self._loader._iterator
        if isinstance(iterator, _MultiProcessingDataLoaderIter):
            iterator._shutdown_workers()  # as Lightning does, of loaders that are torch's own
        self._loader._iterator = None

    def _iterate(self) -> Iterator[dict[str, Any]]:
        for batch in self._loader:
            self.bad.record_all(batch.pop("bad"))
            yield batch


class ResumableLoader(BatchLoader):
    """Training batches: endless, one epoch per iteration, resumable after any batch.

    Every `iter` continues after the last batch handed out; it does not begin the epoch again.

    Args:
        mixed: Samples by position.
        batch_size: Samples in a batch of one rank.
        num_workers: Worker processes; has no influence on the batches.
        rank: This process.
        world_size: Number of processes; each gets other samples, and the same number of batches.
        bad: Where broken images are recorded.
        pin_memory: Page-locked memory, for GPUs.
    """

    def __init__(
        self,
        mixed: MixedSource,
        *,
        batch_size: int,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        bad: BadImages | None = None,
        pin_memory: bool = False,
    ) -> None:
        self.sampler = ResumableSampler(len(mixed), batch_size, rank=rank, world_size=world_size)
        self.consumed = 0
        super().__init__(mixed, self.sampler, num_workers=num_workers, bad=bad, pin_memory=pin_memory)

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Batches to the end of the current epoch."""
        self.sampler.consumed = self.consumed  # workers may have run ahead in an iteration that was given up
        for batch in self._iterate():
            self.consumed = self.sampler.after(self.consumed)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where the sequence stands: positions consumed, and what the sequence depends on."""
        mixed = self.mixed
        return {
            "consumed": self.consumed,
            "length": len(mixed),
            "seed": mixed.seed,
            "sizes": list(mixed.lengths),
            "counts": list(mixed.counts),
            "step_size": self.sampler.step_size,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state, also with other numbers of workers or ranks or another batch size.

        Args:
            state_dict: What `state_dict` gave.

        Raises:
            ValueError: If the sequence is another one; the message names what differs.
        """
        own = self.state_dict()
        differs = [name for name in own if name not in _FREE and state_dict.get(name) != own[name]]
        if differs:
            changes = ", ".join(f"{name}: saved {state_dict.get(name)}, now {own[name]}" for name in differs)
            raise ValueError(f"the data order is not the one of the checkpoint ({changes})")
        self.sampler.load_state_dict({name: state_dict.get(name) for name in ("consumed", "length")})
        self.consumed = self.sampler.consumed
        before = state_dict.get("step_size", self.sampler.step_size)
        if before != self.sampler.step_size and self.consumed % len(self.mixed):
            warnings.warn(
                f"the run goes on amid an epoch with {self.sampler.step_size} samples a step, not {before}: no sample "
                "is lost, but Lightning counts this epoch's batches as before, and may leave out its validation",
                stacklevel=2,
            )


class OrderedLoader(BatchLoader):
    """Evaluation batches: every sample exactly once, in order, shared out to ranks.

    Ranks take every `world_size`-th sample, so they may differ by one sample; none is repeated.

    Args:
        mixed: Samples by position, not shuffled.
        batch_size: Samples in a batch; the last one may be smaller.
        num_workers: Worker processes.
        rank: This process.
        world_size: Number of processes.
        bad: Where broken images are recorded.
        pin_memory: Page-locked memory, for GPUs.
    """

    def __init__(
        self,
        mixed: MixedSource,
        *,
        batch_size: int,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        bad: BadImages | None = None,
        pin_memory: bool = False,
    ) -> None:
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"need batch_size >= 1 and 0 <= rank < world_size, got {batch_size}, {rank}, {world_size}")
        batches = BatchSampler(range(rank, len(mixed), world_size), batch_size, drop_last=False)
        super().__init__(mixed, batches, num_workers=num_workers, bad=bad, pin_memory=pin_memory)

    def __len__(self) -> int:
        """Batches."""
        return len(self._loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """All batches from the first."""
        return self._iterate()
