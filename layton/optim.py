"""`MuonAdamW`: orthogonalised momentum for matrices, AdamW for everything else, as one optimizer.

`torch.optim.Muon` takes two-dimensional parameters only and leaves the rest to a second optimizer, which automatic
optimization and one learning-rate schedule do not go together with. Here a convolution counts as the matrix
(out, in * kernel), and matrices of one shape are orthogonalised in one batched product.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from layton.dtensors import is_parted, joined, local, parted_like, whole
from layton.precision import quick_dtype

# Quintic Newton-Schulz coefficients with the largest slope at zero (Jordan 2024, "Muon")
_A, _B, _C = 3.4445, -4.7750, 2.0315
_TOGETHER = 2**26  # numbers of parted matrices that are whole at once


@torch.no_grad()
def orthogonalise(matrices: Tensor, *, steps: int = 5) -> Tensor:
    """The nearest (semi-)orthogonal matrices, roughly: singular values end up between 0.7 and 1.2.

    Args:
        matrices: (n, rows, columns).
        steps: Newton-Schulz iterations.

    Returns:
        (n, rows, columns); bfloat16 where that multiplies faster, else float32.
    """
    x = matrices.to(quick_dtype(matrices.device))
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.float().norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7).to(x.dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.mT if tall else x


class MuonAdamW(Optimizer):
    """Muon on matrices and convolutions, AdamW on embeddings of small width, norms, biases and the rest.

    The update of a matrix is scaled by ``0.2 sqrt(max(rows, columns))`` to the size that AdamW's has (arXiv 2502.16982,
    eq. 4). On stage 0 of the tokenizer 300 steps gained 1.8 times AdamW's decibels on Scenes, for a fifth more time
    per step. Of parameters that are shared out among ranks (`layton.sharding`), every rank orthogonalises the whole.

    Args:
        params: Parameters; which rule applies is decided by their shapes.
        lr: Learning rate of the matrices.
        adamw_scale: The others learn at ``adamw_scale * lr``.
        momentum: Of the matrices (Nesterov's form).
        betas: Of AdamW.
        weight_decay: Decoupled, for parameters of two or more dimensions.
        min_size: A matrix both of whose sides have at least this size is Muon's.

    Raises:
        ValueError: A value out of range.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 3e-3,
        *,
        adamw_scale: float = 0.2,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.02,
        min_size: int = 64,
    ) -> None:
        if lr < 0 or adamw_scale < 0 or weight_decay < 0 or not 0 <= momentum < 1 or min_size < 2:
            raise ValueError(
                f"out of range: lr {lr}, adamw_scale {adamw_scale}, weight_decay {weight_decay}, "
                f"momentum {momentum}, min_size {min_size}"
            )
        matrices, decayed, rest = [], [], []
        for parameter in params:
            if parameter.ndim < 2:
                rest.append(parameter)
            elif min(_as_matrix(parameter).shape) < min_size:
                decayed.append(parameter)
            else:
                matrices.append(parameter)
        groups: list[dict[str, Any]] = [
            {"params": matrices, "muon": True, "weight_decay": weight_decay},
            {"params": decayed, "muon": False, "weight_decay": weight_decay},
            {"params": rest, "muon": False, "weight_decay": 0.0},
        ]
        defaults = {"lr": lr, "adamw_scale": adamw_scale, "momentum": momentum, "betas": tuple(betas)}
        super().__init__([group for group in groups if group["params"]], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            if trained and group["muon"]:
                self._muon(group, trained)
            elif trained:
                self._adamw(group, trained)
        return loss

    def _muon(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        shapes: defaultdict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        for parameter in parameters:
            shapes[tuple(_as_matrix(parameter).shape)].append(parameter)
        for (rows, columns), together in shapes.items():
            for alike in _pieces(together, rows * columns):
                self._orthogonal_step(group, alike)

    def _orthogonal_step(self, group: dict[str, Any], alike: list[Tensor]) -> None:
        rows, columns = _as_matrix(alike[0]).shape
        gradients = [_gradient(parameter) for parameter in alike]
        buffers = [self._state(parameter, "momentum_buffer") for parameter in alike]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, buffers, group["momentum"])
        wholes = [whole(joined(update, parameter)) for update, parameter in zip(updates, alike, strict=True)]
        stacked = orthogonalise(torch.stack([_as_matrix(update) for update in wholes]))
        size = group["lr"] * 0.2 * max(rows, columns) ** 0.5
        torch._foreach_mul_([local(parameter) for parameter in alike], 1 - group["lr"] * group["weight_decay"])
        for parameter, update in zip(alike, stacked, strict=True):
            part = local(parted_like(update.reshape(parameter.shape), parameter))
            local(parameter).add_(part.to(parameter.dtype), alpha=-size)

    def _adamw(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        (beta1, beta2), lr = group["betas"], group["lr"] * group["adamw_scale"]
        gradients = [_gradient(parameter) for parameter in parameters]
        first = [self._state(parameter, "exp_avg") for parameter in parameters]
        second = [self._state(parameter, "exp_avg_sq") for parameter in parameters]
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        steps = []
        for parameter in parameters:
            state = self.state[parameter]
            state["step"] = state.get("step", 0) + 1
            steps.append(state["step"])
        scale = torch._foreach_sqrt(second)
        torch._foreach_div_(scale, [(1 - beta2**step) ** 0.5 for step in steps])
        torch._foreach_add_(scale, 1e-8)
        parts = [local(parameter) for parameter in parameters]
        torch._foreach_mul_(parts, 1 - lr * group["weight_decay"])
        torch._foreach_addcdiv_(parts, first, scale, [-lr / (1 - beta1**step) for step in steps])

    def _state(self, parameter: Tensor, name: str) -> Tensor:
        state = self.state[parameter]
        if name not in state:
            state[name] = torch.zeros_like(parameter)
        return local(state[name])


def _pieces(parameters: list[Tensor], size: int) -> list[list[Tensor]]:
    """Matrices of ``size`` numbers that are made whole together: all, or of those that are shared out a few."""
    if not any(map(is_parted, parameters)):
        return [parameters]
    count = max(1, _TOGETHER // size)
    return [parameters[start : start + count] for start in range(0, len(parameters), count)]


def _gradient(parameter: Tensor) -> Tensor:
    return local(cast(Tensor, parameter.grad))


def _as_matrix(tensor: Tensor) -> Tensor:
    """(out, in) as it is; a convolution (out, in, kh, kw) as (out, in * kh * kw)."""
    return tensor.flatten(1)


class MatrixDecayAdamW(torch.optim.AdamW):
    """AdamW whose decay spares norms and biases, as LlamaGen and most transformers are trained.

    Args:
        params: Parameters; those of two or more dimensions decay.
        lr: Learning rate.
        betas: Of AdamW.
        weight_decay: Decoupled.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-4,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.05,
    ) -> None:
        every = list(params)
        groups: list[dict[str, Any]] = [
            {"params": [p for p in every if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in every if p.ndim < 2], "weight_decay": 0.0},
        ]
        super().__init__([group for group in groups if group["params"]], lr=lr, betas=(betas[0], betas[1]))
