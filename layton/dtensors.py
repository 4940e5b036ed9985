"""Tensors of which each rank holds a part (`layton.sharding`): that part, the whole, and back.

Ordinary tensors pass through all of these as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def is_parted(tensor: Tensor) -> bool:
    """Whether this rank holds a part of the tensor only."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """The own part of a tensor, in the same memory; a leaf that wants a gradient if the tensor does."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        part: Tensor = tensor.to_local()
    return part.detach().requires_grad_(tensor.requires_grad)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor, on every rank; all ranks have to ask."""
    found: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return found.detach()


def parted_like(tensor: Tensor, model: Tensor) -> Tensor:
    """A whole tensor that every rank has, parted as ``model`` is and on its device; nothing is sent."""
    if not isinstance(model, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor.to(model.device), model.device_mesh, model.placements, src_data_rank=None)


def joined(part: Tensor, model: Tensor) -> Tensor:
    """Own parts that belong together as those of ``model`` do, as one tensor; see `whole`."""
    if not isinstance(model, DTensor):
        return part
    return DTensor.from_local(
        part, model.device_mesh, model.placements, run_check=False, shape=model.shape, stride=model.stride()
    )


def gathered(value: Any, *, keep: bool) -> Any:
    """Nested dictionaries and lists with whole tensors in the processor's memory, one after the other; see `whole`.

    Args:
        value: What is nested.
        keep: Whether this rank wants them; where it does not, None stands in their place.
    """
    if isinstance(value, Tensor):
        found = whole(value)
        return found.cpu() if keep else None
    if isinstance(value, Mapping):
        return {name: gathered(item, keep=keep) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(gathered(item, keep=keep) for item in value)
    return value
