"""Adaptors of another rank than they were trained with: smaller, to take less room; larger, to learn more."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_FIRST, _SECOND = ".lora_A.weight", ".lora_B.weight"


@torch.no_grad()
def reduce_rank(state: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Low-rank adaptors whose products ``B A`` come closest to the given ones' at a smaller rank.

    Those of the largest singular values (Eckart and Young, 1936), divided evenly between the two factors. What an
    adaptor adds is scaled by alpha / r: keep that ratio, with an alpha smaller in the same measure.

    Args:
        state: By PEFT's names, ``X.lora_A.weight`` (r, ...) and ``X.lora_B.weight`` (out, r, ...) for every layer X;
            other tensors stay as they are.
        rank: The new r; adaptors of at most so many stay as they are.

    Returns:
        The same names, in the tensors' own types.

    Raises:
        ValueError: ``rank`` is below 1, there is no adaptor, or one has a first half only.
    """
    layers = [name.removesuffix(_FIRST) for name in state if name.endswith(_FIRST)]
    if rank < 1 or not layers:
        raise ValueError(f"need a rank >= 1 and adaptors, got {rank} and {len(layers)} of them")
    reduced = dict(state)
    for layer in layers:
        if layer + _SECOND not in state:
            raise ValueError(f"{layer} has {_FIRST} and no {_SECOND}")
        first, second = state[layer + _FIRST], state[layer + _SECOND]
        if len(first) > rank:
            reduced[layer + _FIRST], reduced[layer + _SECOND] = _reduced(first, second, rank)
    return reduced


@torch.no_grad()
def extend_rank(state: Mapping[str, Tensor], fresh: Mapping[str, Tensor], scale: float = 1.0) -> dict[str, Tensor]:
    """Low-rank adaptors within untrained ones of at least their rank: the same products ``B A``, with room to learn.

    Args:
        state: As in `reduce_rank`.
        fresh: Adaptors on the same layers whose B is zero.
        scale: What B is multiplied by: their alpha / r over that of the fresh ones.

    Returns:
        Tensors like those of ``fresh``.

    Raises:
        ValueError: Layers or widths differ, or a rank is larger than that of ``fresh``.
    """
    if odd := sorted(state.keys() ^ fresh.keys()):
        raise ValueError(f"adaptors on other layers: {len(odd)} tensors differ, first {odd[:3]}")
    extended = {}
    for name, values in state.items():
        place = int(name.endswith(_SECOND))  # which dimension is the rank's
        room, size = list(fresh[name].shape), list(values.shape)
        if size[place] > room[place] or size[:place] + size[place + 1 :] != room[:place] + room[place + 1 :]:
            raise ValueError(f"{name} of shape {size} does not fit into {room}")
        extended[name] = fresh[name].clone()
        extended[name].narrow(place, 0, size[place]).copy_(values * scale if place else values)
    return extended


def _reduced(first: Tensor, second: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    # The factors' own small triangles decide: no product of the layer's size is made. A convolution's B is 1 x 1.
    basis_out, core_out = torch.linalg.qr(second.double().flatten(1))
    basis_in, core_in = torch.linalg.qr(first.double().flatten(1).T)
    left, values, right = torch.linalg.svd(core_out @ core_in.T, full_matrices=False)
    root = values[:rank].sqrt()
    new_first = (root[:, None] * (right[:rank] @ basis_in.T)).reshape(rank, *first.shape[1:])
    new_second = (basis_out @ left[:, :rank] * root).reshape(len(second), rank, *second.shape[2:])
    return new_first.to(first).contiguous(), new_second.to(second).contiguous()
