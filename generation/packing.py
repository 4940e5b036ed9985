"""Weights laid out for decoding on a CPU.

A product with one to sixteen rows costs what reading its weights costs, and the ordinary matrix product reads them in
an order made for many rows. oneDNN's blocked order, into which weights are brought once, is two to three times as fast
here, and a second row (guidance) is nearly free. Rows do not influence one another's rounding either, so that an image
decodes to the same logits in any batch. The operators are those that torch.compile uses; where they are
missing, models stay as they are.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class PackedLinear(nn.Module):
    """A linear layer with a packed copy of its weights, for inference on a CPU.

    Args:
        linear: The layer; later changes of its weights are not seen.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        bias = linear.bias
        self._bias: Tensor | None = None if bias is None else bias.detach()
        self._weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 2)
        self._product = torch.ops.mkldnn._linear_pointwise.default

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features); a row's result does not depend on how many rows there are."""
        if x.numel() == self.in_features:  # one row goes another way in oneDNN and rounds differently; two do not
            row = x.reshape(1, -1)
            twice = torch.cat([row, row])  # a seventh of the time of repeat
            result: Tensor = self._product(twice, self._weight, self._bias, "none", [], "")
            return result[0].view(*x.shape[:-1], self.out_features)
        result = self._product(x, self._weight, self._bias, "none", [], "")
        return result


def packed_linear(linear: nn.Linear) -> nn.Module:
    """The layer packed, or as it is where that is not possible."""
    return PackedLinear(linear) if packable(linear) else linear


def packable(linear: nn.Linear) -> bool:
    """Whether this machine's torch can pack the layer: float32 on a CPU, with oneDNN."""
    weight = linear.weight
    known = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    return bool(known and weight.device.type == "cpu" and weight.dtype == torch.float32)


def packed(module: M) -> M:
    """The same module with every linear layer packed, where that is possible.

    Everything else is shared with ``module``, which is not changed. Packed twice is packed once.
    """
    twin = copy.copy(module)
    twin._modules = {name: _packed_child(child) for name, child in module._modules.items()}
    return twin


def _packed_child(child: nn.Module | None) -> nn.Module | None:
    if child is None or isinstance(child, PackedLinear):
        return child
    return packed_linear(child) if type(child) is nn.Linear else packed(child)
