"""Weights laid out for decoding on a CPU.

A product with one to sixteen rows costs what reading its weights costs, and the ordinary matrix product reads them in
an order made for many rows. Brought once into an order of their own, a product with two rows takes here about what the
ordinary one takes, with four to eight about half, and a second row (guidance) is nearly free. MKL's order is the
quicker one for small layers, oneDNN's for those with many outputs. In both, rows do not influence one another's
rounding, from a fewest number of rows on that depends on the processor and is found out here, so that an image decodes
to the same logits in any batch. The operators are those that torch.compile uses; where they are missing, models stay as
they are.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)

_SMALL = 2**20  # weights below which MKL's order is the quicker one, whatever their shape
_ROWS = 2  # for which weights are laid out; an order serves any number


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
        weight = linear.weight.detach()
        self._plain: Tensor | None = None  # MKL's product takes it as well, for shapes that it is not given here
        self._fewest = _ROWS
        if _quicker_by_mkl(linear) and (fewest := _fewest_rows_of_mkl()) is not None:
            self._fewest = fewest
            self._plain = weight
            self._weight: Tensor = torch.ops.mkl._mkl_reorder_linear_weight(weight, _ROWS)
        else:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features); a row's result does not depend on how many rows there are."""
        rows = x.numel() // self.in_features
        if not 0 < rows < self._fewest:  # fewer go another way and round differently
            return self._product(x)
        few = x.reshape(rows, -1)
        more = torch.cat([few] * -(-self._fewest // rows))  # a seventh of the time of repeat
        return self._product(more)[:rows].view(*x.shape[:-1], self.out_features)

    def _product(self, x: Tensor) -> Tensor:
        result: Tensor
        if self._plain is None:
            result = torch.ops.mkldnn._linear_pointwise.default(x, self._weight, self._bias, "none", [], "")
        else:
            rows = x.numel() // self.in_features
            result = torch.ops.mkl._mkl_linear.default(x, self._weight, self._plain, self._bias, rows)
        return result


def _quicker_by_mkl(linear: nn.Linear) -> bool:
    """Measured with 2 to 16 rows on the layers of models of 38M and 111M parameters."""
    few = linear.out_features <= linear.in_features or linear.weight.numel() < _SMALL
    return few and torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear")


@cache
def _fewest_rows_of_mkl() -> int | None:
    """From how many rows on MKL rounds a row as it does among many on this processor: 2, on AMD's 4; None if never."""
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(rows, 512, generator=generator) for rows in (64, 130))
    laid_out = torch.ops.mkl._mkl_reorder_linear_weight(weight, _ROWS)

    def product(rows: int) -> Tensor:
        found: Tensor = torch.ops.mkl._mkl_linear.default(x[:rows], laid_out, weight, None, rows)
        return found

    many = product(len(x))
    alike = [bool(torch.equal(product(rows), many[:rows])) for rows in range(1, 33)]
    return next((rows for rows in (2, 4, 8) if all(alike[rows - 1 :])), None)


class PackedRMSNorm(nn.Module):
    """`torch.nn.RMSNorm` in three operations in place of eight: for few rows these cost more than the arithmetic.

    Args:
        norm: The layer, over the last dimension; later changes of its weights are not seen.
    """

    def __init__(self, norm: nn.RMSNorm) -> None:
        super().__init__()
        (width,) = norm.normalized_shape
        self.weight = norm.weight
        self._scale = norm.weight.detach() * width**0.5
        self._floor = self._scale.new_tensor((width * (norm.eps or torch.finfo(torch.float32).eps)) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D): x sqrt(D) / sqrt(|x|^2 + D eps), scaled."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x.div(length.hypot_(self._floor)).mul_(self._scale)


def packed_linear(linear: nn.Linear) -> nn.Module:
    """The layer packed, or as it is where that is not possible."""
    return PackedLinear(linear) if packable(linear) else linear


def packable(layer: nn.Linear | nn.RMSNorm) -> bool:
    """Whether this machine's torch can pack the layer: float32 on a CPU, with oneDNN."""
    weight = layer.weight
    known = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    return bool(known and weight.device.type == "cpu" and weight.dtype == torch.float32)


def packed(module: M) -> M:
    """The same module with every linear layer and norm packed, where that is possible.

    Everything else is shared with ``module``, which is not changed. Packed twice is packed once.
    """
    twin = copy.copy(module)
    children = module._modules.items()
    twin._modules = {name: None if child is None else packed_child(child) for name, child in children}
    return twin


class PackedCopy(Generic[M]):
    """One packed copy of a module for many batches, made anew when the module's weights have changed."""

    def __init__(self) -> None:
        self._stamp: list[tuple[int, float]] = []
        self._twin: M | None = None

    def __getstate__(self) -> dict[str, object]:
        """Nothing: packed weights can be neither copied nor pickled, and are made anew."""
        return vars(PackedCopy())

    def of(self, module: M) -> M:
        """`packed`, of the module as it is now; where nothing can be packed, the module itself."""
        weights = [*module.parameters(), *module.buffers()]
        if any(each.device.type != "cpu" for each in weights):
            return module
        # Their sums, as averages and fused optimizers write past torch's count of changes. One reading of the weights,
        # where an image needs hundreds.
        stamp = [(id(each), float(each.detach().sum())) for each in weights]
        if self._twin is None or stamp != self._stamp:
            self._stamp, self._twin = stamp, packed(module)
        # What is not weights, such as a compiled step or the training mode, is the module's own.
        vars(self._twin).update({name: value for name, value in vars(module).items() if name != "_modules"})
        return self._twin


def packed_child(child: nn.Module) -> nn.Module:
    """A part of a module, packed."""
    if isinstance(child, PackedLinear | PackedRMSNorm):
        return child
    if type(child) is nn.RMSNorm:
        return PackedRMSNorm(child) if packable(child) else child
    return packed_linear(child) if type(child) is nn.Linear else packed(child)
