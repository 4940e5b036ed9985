"""`FullySharded`: weights, gradients, averages and optimizer states shared out among ranks (FSDP2).

For models that a GPU does not hold with all that training keeps of them. Each rank keeps a part of every parameter; a
training step gathers a block's when its turn comes. Whatever else looks at a model (validation, pictures, exports) sees
it whole on every rank, as an ordinary module: nobody there has to keep in step. Checkpoints are those of one device, so
that a run goes on with any number of ranks, sharded or not.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.optim import Optimizer

from layton.dtensors import gathered, is_parted, parted_like, whole
from layton.ranks import all_gather_items

UNITS = frozenset(
    {"Block", "BasicTransformerBlock", "ResnetBlock2D", "JointTransformerBlock", "FluxTransformerBlock"}
    | {"FluxSingleTransformerBlock", "CLIPEncoderLayer", "T5Block"}
)
"""Classes whose parameters are gathered together, and let go together. Only ever called as modules."""


class FullySharded(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, over all ranks, with this library's checkpoints: ``--trainer.strategy fsdp``.

    Args:
        process_group_backend: ``nccl`` or ``gloo``; by default what suits the device.
        timeout: Of collective operations.
    """

    def __init__(
        self, process_group_backend: str | None = None, timeout: timedelta | None = default_pg_timeout
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def setup_environment(self) -> None:
        """All ranks share one model."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Part the model before optimizers are made for it."""
        methods = getattr(self._task, "gathering_methods", ("training_step",))
        shard(self._task, self.device_mesh["data_parallel"], methods)
        super().setup(trainer)

    @property
    def _task(self) -> LightningModule:
        return cast(LightningModule, self.lightning_module)

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """A checkpoint is loaded into the whole model, in the order in which it is with one device."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Optimizers are restored afterwards."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole tensors on rank 0, which writes them; nothing elsewhere. All ranks have to ask."""
        found: dict[str, Any] = gathered(self._task.state_dict(), keep=self.is_global_zero)
        return found if self.is_global_zero else {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As `lightning_module_state_dict`."""
        inner = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        found: dict[str, Any] = gathered(inner.state_dict(), keep=self.is_global_zero)
        return found if self.is_global_zero else {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """As with one device, through the ``CheckpointIO``."""
        super(ModelParallelStrategy, self).save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """As with one device, through the ``CheckpointIO``: every rank reads the file."""
        return super(ModelParallelStrategy, self).load_checkpoint(checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Before it is parted."""
        self._task.load_state_dict(checkpoint["state_dict"], strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Each rank takes its part of whole tensors."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(_parted_state(optimizer, state))


def _parted_state(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """The state of an optimizer, tensors shaped as their parameter parted as that is."""
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    of = dict(zip(numbers, parameters, strict=True))

    def parted(value: Any, parameter: Tensor) -> Any:
        fits = isinstance(value, Tensor) and value.shape == parameter.shape
        return parted_like(value, parameter) if fits else value

    parts = {n: {name: parted(value, of[n]) for name, value in held.items()} for n, held in state["state"].items()}
    return {**state, "state": parts}


def shard(task: LightningModule, mesh: DeviceMesh, methods: Iterable[str] = ("training_step",)) -> None:
    """Part the parameters of a task among the ranks of a mesh, block by block.

    Buffers stay whole on every rank, and so do parameters that a module changes in its forward pass (codebooks that
    follow their features).

    Args:
        task: Its methods but for ``methods`` see the parameters of blocks parted, and have to go through these.
        mesh: Of one dimension.
        methods: Whatever computes a loss; each gathers, and has its backward pass behind it.

    Raises:
        ValueError: Ranks begin with other weights, or a parameter cannot be parted.
    """
    _require_equal(task)
    changed = {p for module in task.modules() for p in getattr(module, "changes_in_forward", ())}
    for name, parameter in task.named_parameters():
        if parameter.ndim == 0 or (parameter.requires_grad and parameter in changed):
            what = "is a single number" if parameter.ndim == 0 else "is changed by its forward pass and by gradients"
            raise ValueError(f"{name} {what}, and cannot be shared out: take --trainer.strategy ddp")
    for module in reversed(list(task.modules())):
        if type(module).__name__ in UNITS:
            fully_shard(module, mesh=mesh, ignored_params=changed)
    # let go after each forward pass, too: not every one has a backward pass behind it, and what stays is out of date
    fully_shard(task, mesh=mesh, ignored_params=changed, reshard_after_forward=True)
    for name in methods:
        register_fsdp_forward_method(task, name)


def _require_equal(task: LightningModule) -> None:
    sums = [float(parameter.detach().double().sum()) for parameter in task.parameters()]
    if any(other != sums for other in all_gather_items([sums])):
        raise ValueError("ranks begin with other weights: set --seed_everything, and give all of them the same files")


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module as it was before its parameters were parted."""
    kind = type(module)
    return cast("type[nn.Module]", kind.__mro__[2]) if isinstance(module, FSDPModule) else kind


@contextmanager
def whole_weights(task: LightningModule) -> Iterator[None]:
    """Within it the modules of a task are as if nothing were parted, for reading; all ranks have to enter.

    Their parameters are whole, and other objects than those in training; what is changed in them is forgotten.
    """
    parted = [module for module in task.modules() if isinstance(module, FSDPModule)]
    with ExitStack() as back:
        for module in cast("list[nn.Module]", parted):
            back.callback(_restore, module, type(module), module._forward_pre_hooks, module._forward_hooks)
            module.__class__ = own_class(module)
            module._forward_pre_hooks = _without_gathering(module._forward_pre_hooks)
            module._forward_hooks = _without_gathering(module._forward_hooks)
        if parted:
            back.callback(_put, _gather(task))
        yield


def _gather(task: LightningModule) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Put whole parameters in the place of parted ones; gives these, and where they were. Shared ones stay shared."""
    places, made = [], dict[nn.Parameter, nn.Parameter]()
    for module in task.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and is_parted(parameter):
                places.append((module, name, parameter))
    for module, name, parameter in places:
        if parameter not in made:
            made[parameter] = nn.Parameter(whole(parameter), requires_grad=parameter.requires_grad)
        module._parameters[name] = made[parameter]
    return places


def _put(places: list[tuple[nn.Module, str, nn.Parameter]]) -> None:
    for module, name, parameter in places:
        module._parameters[name] = parameter


def _restore(module: nn.Module, kind: type[nn.Module], before: Any, after: Any) -> None:
    module.__class__ = kind
    module._forward_pre_hooks, module._forward_hooks = before, after


def _without_gathering(hooks: Mapping[int, Callable[..., Any]]) -> OrderedDict[int, Callable[..., Any]]:
    """The hooks of a module but for FSDP's own."""
    theirs = FSDPModule.__module__.rpartition(".")[0]
    return OrderedDict(
        (number, hook)
        for number, hook in hooks.items()
        if not type(getattr(hook, "__self__", None)).__module__.startswith(theirs)
    )


class WholeWeights(Callback):
    """Validation and tests of a sharded model see it whole (`whole_weights`); the task attaches it itself."""

    def __init__(self) -> None:
        self._open = ExitStack()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather, after averages were swapped in."""
        self._open.enter_context(whole_weights(pl_module))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go, before anything is saved."""
        self._open.close()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As before validation."""
        self.on_validation_start(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As after validation."""
        self.on_validation_end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go, too, when validation failed."""
        self._open.close()


def is_sharded(task: nn.Module) -> bool:
    """Whether each rank holds a part of the task's parameters only."""
    return isinstance(task, FSDPModule)
