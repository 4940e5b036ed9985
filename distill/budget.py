"""What training costs, in forward-equivalents of the denoiser: the unit in which methods are compared.

One sample through the network is 1 F, its backward pass 2 F more. Per sample plain denoising training then costs 3 F
and latent consistency distillation 6 F (student with backward, guided teacher 2, target 1). Teacher, discriminator and
data generation are counted with everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.hooks import RemovableHandle

_DEEPEST = 3  # dots in the name of a stage within a denoiser, such as ``denoiser.unet.down_blocks.0``
BACKWARD = 2.0  # gradients of inputs and of weights, each about one forward; the same for LoRA, by convention


class Handle(Protocol):
    """Something that can be removed."""

    def remove(self) -> None:
        """End what it stands for."""


class _Handles:
    def __init__(self, *handles: RemovableHandle) -> None:
        self.handles = handles

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


class Budget:
    """Accumulates forward-equivalents of watched networks, by account; survives restarts through its state.

    Views of one network (``distill.adapters``) share its count: watch the shared denoiser once, not each view. Gradient
    checkpointing repeats forwards inside the network, which is a matter of memory and not counted.
    """

    def __init__(self) -> None:
        self.accounts: dict[str, float] = {}

    @property
    def total(self) -> float:
        """Forward-equivalents of all accounts."""
        return sum(self.accounts.values())

    def add(self, equivalents: float, account: str = "other") -> None:
        """Count what no watched network sees, for instance data generated beforehand.

        Raises:
            ValueError: The number is negative or not finite.
        """
        if not 0.0 <= equivalents < float("inf"):
            raise ValueError(f"forward-equivalents must be >= 0 and finite, got {equivalents}")
        self.accounts[account] = self.accounts.get(account, 0.0) + equivalents

    def watch(self, network: nn.Module, account: str = "denoiser", *, cost: float = 1.0) -> Handle:
        """Count every call of a network from now on; a backward pass through a call is counted when it happens.

        It is seen wherever it enters: at the network's output, or at the features of its blocks, as a discriminator's.

        Args:
            network: Called with at least one tensor, whose first dimension is the batch.
            account: Name to count under.
            cost: Cost of one sample relative to the denoiser's, as `count_flops` counts both.

        Returns:
            A handle whose ``remove()`` ends the watch.

        Raises:
            ValueError: The cost is not positive.
        """
        if not cost > 0:
            raise ValueError(f"cost must be > 0, got {cost}")

        call: _Call | None = None  # blocks that gradient checkpointing repeats later belong to none

        def before_forward(_: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal call
            call = _Call(lambda samples: self.add(BACKWARD * cost * samples, account))

        def after_block(_: nn.Module, args: tuple[Any, ...], output: object) -> None:
            if call is not None:
                call.await_gradients(output)

        def after_forward(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
            nonlocal call
            samples = len(next(tensors_in((args, kwargs))))
            self.add(cost * samples, account)
            if call is not None:
                call.samples = samples
                call.await_gradients(output)
            call = None

        blocks = [part for name, part in network.named_modules() if name and _is_stage(name, part)]
        return _Handles(
            network.register_forward_pre_hook(before_forward),
            *(block.register_forward_hook(after_block) for block in blocks),
            network.register_forward_hook(after_forward, with_kwargs=True),
        )

    @contextmanager
    def watching(self, costs: Mapping[str, tuple[nn.Module, float]]) -> Iterator[Budget]:
        """Watch several networks inside a ``with`` block.

        Args:
            costs: For each account the network and its relative cost.
        """
        handles = [self.watch(network, account, cost=cost) for account, (network, cost) in costs.items()]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def state_dict(self) -> dict[str, float]:
        """The accounts, to be kept in a checkpoint."""
        return dict(self.accounts)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on counting from what ``state_dict`` gave."""
        self.accounts = {account: float(value) for account, value in state.items()}


class _Call:
    """One call of a network, through which gradients may come back: each backward pass is reported once.

    It keeps none of the network's tensors alive, or checkpointing would have nothing to free.
    """

    def __init__(self, report: Callable[[int], None]) -> None:
        self.report, self.samples, self._pass = report, 0, -1

    def await_gradients(self, output: object) -> None:
        if torch.is_grad_enabled():
            for tensor in tensors_in(output):
                if tensor.requires_grad:
                    tensor.register_hook(self._came)

    def _came(self, _: Tensor) -> None:
        # as torch's own register_multi_grad_hook tells passes apart, which would keep the tensors
        this = torch._C._current_graph_task_id()
        if this != self._pass:
            self._pass = this
            self.report(self.samples)


def _is_stage(name: str, part: nn.Module) -> bool:
    """Whether somebody may read what a part puts out: stages of a network, not the thousands of parts within these."""
    return name.count(".") <= _DEEPEST and any(part.children())


def flop_counter() -> FlopCounterMode:
    """A counter of the operations of matrix products, convolutions and attention.

    torch's own knows the kernels of GPUs, and takes attention on CPUs and products with packed weights for nothing.
    """
    formulas = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    packed = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if packed is not None:
        formulas[packed] = _packed_linear
    laid_out = getattr(torch.ops.mkl, "_mkl_linear", None)
    if laid_out is not None:
        formulas[laid_out] = _mkl_linear
    return FlopCounterMode(display=False, custom_mapping=formulas)


def _packed_linear(rows: torch.Size, weight: torch.Size, *_: object, **__: object) -> int:
    return 2 * rows.numel() * weight[0]


def _mkl_linear(rows: torch.Size, laid_out: torch.Size, weight: torch.Size, *_: object, **__: object) -> int:
    return 2 * rows.numel() * weight[0]


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(
    grad: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object
) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))


def count_flops(run: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products, convolutions and attention in ``run()``."""
    with torch.no_grad(), flop_counter() as counter:
        run()
    return counter.get_total_flops()


def tensors_in(value: object) -> Iterator[Tensor]:
    """Tensors in nested tuples, lists and dicts, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, Iterable) and not isinstance(value, str | bytes):
        for item in value:
            yield from tensors_in(item)
