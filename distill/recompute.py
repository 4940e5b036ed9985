"""What a backward pass computes again instead of keeping: memory against time, on networks of diffusers.

Diffusers' gradient checkpointing repeats whole blocks, at the price of a forward pass. Most of what a block keeps is
not worth that: inputs and results of normalizations, activations, gates and attention maps, quickly made again from the
results of the linear layers and convolutions. ``cheap`` keeps the latter and repeats the rest. Numbers are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, cast, get_args

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

Recompute = Literal["nothing", "cheap", "blocks"]
"""``cheap``: everything but matrix products and convolutions; ``blocks``: all of it, diffusers' own checkpointing."""

_ATEN = torch.ops.aten
KEPT = [
    _ATEN.convolution.default,
    _ATEN.addmm.default,
    _ATEN.mm.default,
    _ATEN.bmm.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
]
"""Operations whose results ``cheap`` keeps."""


def set_recompute(network: nn.Module, what: Recompute) -> None:
    """Choose what the backward passes of a network repeat, from now on.

    Args:
        network: A network of diffusers, or one with its ``enable_gradient_checkpointing``.
        what: See `Recompute`.

    Raises:
        ValueError: Unknown choice.
    """
    if what not in get_args(Recompute):
        raise ValueError(f"recompute must be one of {get_args(Recompute)}, got {what!r}")
    switch = cast(Any, network)
    if what == "nothing":
        switch.disable_gradient_checkpointing()
    elif what == "blocks":
        switch.enable_gradient_checkpointing()
    else:
        switch.enable_gradient_checkpointing(gradient_checkpointing_func=checkpoint_cheap)


def checkpoint_cheap(block: Callable[..., Any], *args: Any) -> Any:
    """Run a block whose backward pass repeats what is quickly made again."""
    contexts = partial(create_selective_checkpoint_contexts, KEPT)
    return checkpoint(block, *args, use_reentrant=False, context_fn=contexts)
