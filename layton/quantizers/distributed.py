"""The few collective operations a shared codebook needs; each does nothing in a single process."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def has_ranks() -> bool:
    """Whether more than one process trains together, asked now and never remembered."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over the ranks of a tensor of any one shape; bit-equal on all of them."""
    if has_ranks():
        dist.all_reduce(tensor)
    return tensor


def broadcast_from_first(tensor: Tensor) -> Tensor:
    """The tensor of rank 0, on every rank."""
    if has_ranks():
        dist.broadcast(tensor, src=0)
    return tensor


def all_gather_rows(rows: Tensor) -> Tensor:
    """Rows (n_r, d) of all ranks r, in their order: (sum of n_r, d). The n_r may differ."""
    if not has_ranks():
        return rows
    world_size = dist.get_world_size()
    sizes = [torch.zeros((), dtype=torch.int64, device=rows.device) for _ in range(world_size)]
    dist.all_gather(sizes, torch.tensor(len(rows), device=rows.device))
    longest = max(int(size) for size in sizes)
    padded = rows.new_zeros(longest, rows.shape[1])  # collectives want equal shapes
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(world_size)]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])
