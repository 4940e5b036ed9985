"""Several processes that share one work: who is who, and the few collective operations it takes.

Each operation does nothing in a single process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from layton.devices import local_rank
from layton.errors import UsageError

T = TypeVar("T")


def num_ranks() -> int:
    """Number of processes that share the work, asked now and never remembered."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def has_ranks() -> bool:
    """Whether there are several."""
    return num_ranks() > 1


def own_rank() -> int:
    """Which of them this one is; 0 is the one that tells and writes."""
    return dist.get_rank() if has_ranks() else 0


def own_share(items: Sequence[T]) -> Sequence[T]:
    """Every n-th of the items, beginning with this process's number: all of them where there is one."""
    return items[own_rank() :: num_ranks()]


@contextmanager
def joined_ranks() -> Iterator[bool]:
    """Join the others if ``torchrun`` began this process as one of several; all but the first are told nothing.

    Yields:
        Whether this is the first, or the only one.

    Raises:
        UsageError: There are GPUs, and fewer than processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or has_ranks():
        yield own_rank() == 0
        return
    if torch.cuda.is_available():
        if local_rank() >= torch.cuda.device_count():
            raise UsageError(f"process {local_rank()} has no GPU of its own: there are {torch.cuda.device_count()}")
        torch.cuda.set_device(local_rank())
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        with ExitStack() as silent:
            if own_rank():
                silent.enter_context(redirect_stdout(silent.enter_context(open(os.devnull, "w"))))
            yield own_rank() == 0
        dist.barrier()  # who leaves while another is still gathering breaks that one's connection
    finally:
        dist.destroy_process_group()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over the ranks of a tensor of any one shape; bit-equal on all of them."""
    if has_ranks():
        moved = _where_it_works(tensor)
        dist.all_reduce(moved)
        if moved is not tensor:
            tensor.copy_(moved)
    return tensor


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Mean over the ranks of a tensor of any one shape, with gradients into all of them."""
    if not has_ranks():
        return tensor
    from torch.distributed.nn.functional import all_reduce  # here: it brings remote calls with it

    total: Tensor = all_reduce(_where_it_works(tensor))
    return total.to(tensor.device) / num_ranks()


def all_reduce_counts(counts: Mapping[str, float]) -> dict[str, float]:
    """Sums over the ranks of what each has counted, by name; names need not be the same everywhere."""
    parts: list[Mapping[str, float]] = [counts]
    if has_ranks():
        parts = [{}] * num_ranks()
        dist.all_gather_object(parts, dict(counts))
    return {name: sum(part.get(name, 0.0) for part in parts) for name in sorted({n for part in parts for n in part})}


def broadcast_from_first(tensor: Tensor) -> Tensor:
    """The tensor of rank 0, on every rank."""
    if has_ranks():
        moved = _where_it_works(tensor)
        dist.broadcast(moved, src=0)
        if moved is not tensor:
            tensor.copy_(moved)
    return tensor


def all_gather_rows(rows: Tensor) -> Tensor:
    """Rows (n_r, d) of all ranks r, in their order: (sum of n_r, d). The n_r may differ."""
    if not has_ranks():
        return rows
    given, rows = rows.device, _where_it_works(rows)
    world_size = num_ranks()
    sizes = [torch.zeros((), dtype=torch.int64, device=rows.device) for _ in range(world_size)]
    dist.all_gather(sizes, torch.tensor(len(rows), device=rows.device))
    longest = max(int(size) for size in sizes)
    padded = rows.new_zeros(longest, rows.shape[1])  # collectives want equal shapes
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(world_size)]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)]).to(given)


def _where_it_works(tensor: Tensor) -> Tensor:
    """The tensor, on the GPU where collectives take no other."""
    return tensor.cuda() if dist.get_backend() == "nccl" else tensor


def all_gather_shares(rows: Tensor) -> Tensor:
    """Rows of all ranks in the order of the items, where each has those of its `own_share`: (n_r, d) to (n, d)."""
    found = all_gather_rows(rows)
    if not has_ranks():
        return found
    whose = torch.arange(len(found)) % num_ranks()
    return found[whose.argsort(stable=True).argsort()]


def all_gather_items(items: Sequence[T]) -> list[T]:
    """Items of all ranks in their order, where each has those of its `own_share`; pickled between the processes."""
    if not has_ranks():
        return list(items)
    parts: list[Sequence[T]] = [()] * num_ranks()
    dist.all_gather_object(parts, items)
    return [parts[number % len(parts)][number // len(parts)] for number in range(sum(map(len, parts)))]


def said_by_first(value: T) -> T:
    """The value of the first process, in every one; pickled between them."""
    if not has_ranks():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
