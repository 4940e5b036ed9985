"""Adapted layers that add their low-rank update to the weight, not to the output, where that is less work.

``x W^T + s (x A^T) B^T`` and ``x (W + s B A)^T`` are the same. The first is how a LoRA is usually computed, and right
where layers are wide beside the rank. In small networks at the published rank 64 the two thin products cost more than
the layer itself, and the second form makes an adapted network as fast as a bare one, with fewer tensors to keep for the
backward pass. Each call takes the cheaper form, by counted multiplications.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def merging_pays(*, positions: int, columns: int, rows: int, rank: int, learns: bool) -> bool:
    """Whether a layer's product with an updated weight takes fewer multiplications than a second, thin path.

    Args:
        positions: Rows of the layer's input as a matrix: samples times tokens or pixels.
        columns: Inputs of the layer, times the size of a convolution's kernel.
        rows: Outputs.
        rank: r.
        learns: Whether a backward pass follows, which costs twice the forward pass. The updated weight then has a
            gradient as large as itself, which the frozen one does not have.
    """
    passes = 3 if learns else 1
    apart = passes * rank * (columns + rows) * positions
    merged = passes * rank * columns * rows + (columns * rows * positions if learns else 0)
    return merged < apart


def updated_weight(weight: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
    """``W + s B A``, shaped like W: (out, in) or (out, in, kh, kw).

    Args:
        weight: W.
        down: A, (r, in) or (r, in, kh, kw).
        up: B, (out, r) or (out, r, 1, 1).
        scaling: s.
    """
    # Not addmm: `distill.recompute` keeps its results, and this one is as large as the weight.
    merged = torch.baddbmm(weight.flatten(1)[None], up.flatten(1)[None], down.flatten(1)[None], alpha=scaling)
    return merged[0].view_as(weight)


class MergedForward(nn.Module):
    """Mixed into peft's ``Linear`` and ``Conv2d`` LoRA layers: their forward pass, in the cheaper form.

    In full precision on the CPU only: half precision, and TF32 on a GPU, would round small updates of a weight away.
    Everything unusual (dropout, variants of LoRA, merged adapters, groups, hooks on parts) is left to peft.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As peft's ``forward``, equal up to rounding."""
        layer = cast(Any, self)
        names = [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.lora_A]
        if not names or args or kwargs or not _is_plain(layer, names, x):
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        base = layer.get_base_layer()
        size = {"positions": _positions(base, x), "columns": base.weight[0].numel(), "rows": len(base.weight)}
        learns = torch.is_grad_enabled()
        # Each adapter by itself, so that another one beside it does not change what it computes.
        merged = [name for name in names if merging_pays(**size, rank=layer.r[name], learns=learns)]
        weight = base.weight
        for name in merged:
            weight = updated_weight(weight, layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])
        if not merged:
            output = base(x)
        elif isinstance(base, nn.Conv2d):
            output = base._conv_forward(x, weight, base.bias)  # as the layer itself would, its padding included
        else:
            output = F.linear(x, weight, base.bias)
        for name in names:
            if name not in merged:
                output = output + layer.lora_B[name](layer.lora_A[name](x)) * layer.scaling[name]
        return cast(Tensor, output)


def _is_plain(layer: Any, names: list[str], x: Tensor) -> bool:
    """Whether the layer is ``W x + s B A x`` and no more, in float32 on the CPU."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    base = layer.get_base_layer()
    if type(base) not in (nn.Linear, nn.Conv2d) or base.weight.dtype != torch.float32 or layer.merged:
        return False
    if isinstance(base, nn.Conv2d) and base.groups != 1:
        return False
    parts = (base, *(part[name] for part in (layer.lora_A, layer.lora_B) for name in names))
    if any(part._forward_hooks or part._forward_pre_hooks for part in parts):
        return False
    return all(
        isinstance(layer.lora_dropout[name], nn.Identity)
        and name not in layer.lora_variant
        and layer.lora_A[name].weight.dtype == torch.float32
        and layer.lora_A[name].bias is None
        and layer.lora_B[name].bias is None
        for name in names
    )


def _positions(base: nn.Linear | nn.Conv2d, x: Tensor) -> int:
    if isinstance(base, nn.Conv2d):
        return x.numel() // x.shape[-3] // (base.stride[0] * base.stride[1])
    return x.numel() // x.shape[-1]
