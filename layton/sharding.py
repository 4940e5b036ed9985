"""`FullySharded`: weights, gradients, averages and optimizer states shared out among ranks (FSDP2).

For models that a GPU does not hold with all that training keeps of them. Each rank keeps a part of every parameter; a
training step gathers a block's when its turn comes. Whatever else looks at a model (validation, pictures, exports) sees
it whole on every rank, as an ordinary module: nobody there has to keep in step. Checkpoints are those of one device, so
that a run goes on with any number of ranks, sharded or not.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.optim import Optimizer

from layton.dtensors import gathered, is_parted, parted_like, whole
from layton.folder import weights_hashes
from layton.optim import MuonAdamW
from layton.ranks import all_gather_items

UNITS = frozenset(
    {"Block", "BasicTransformerBlock", "ResnetBlock2D", "JointTransformerBlock", "FluxTransformerBlock"}
    | {"FluxSingleTransformerBlock", "CLIPEncoderLayer", "T5Block"}
)
"""Classes whose parameters are gathered together, and let go together. Only ever called as modules."""
_TRIED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, MuonAdamW)
_RECORD = "_layton_sharding"  # attribute of a task


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
        if not is_sharded(self._task):
            methods = getattr(self._task, "gathering_methods", ("training_step",))
            shard(self._task, self.device_mesh["data_parallel"], methods)
        super().setup(trainer)

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Refuse optimizers that were never tried on parted parameters: some work on whole ones only.

        Raises:
            ValueError: Names the optimizer.
        """
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            if not isinstance(optimizer, _TRIED):
                raise ValueError(
                    f"{type(optimizer).__name__} was not tried on parameters that are shared out: take AdamW, SGD or "
                    "layton.optim.MuonAdamW, or --trainer.strategy ddp"
                )

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
        """Whole tensors on rank 0, which writes them; nothing elsewhere. All ranks have to ask.

        What the task leaves out of checkpoints is not gathered.
        """
        left_out: frozenset[str] = cast(Any, getattr(self._task, "left_out", frozenset))()
        with parted_weights(self._task):
            state = {name: value for name, value in self._task.state_dict().items() if name not in left_out}
            found: dict[str, Any] = gathered(state, keep=self.is_global_zero)
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
        """Before it is parted, but in a second fit."""
        own = self._task.state_dict()
        state = {name: parted_like(value, own.get(name, value)) for name, value in checkpoint["state_dict"].items()}
        self._task.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Each rank takes its part of whole tensors."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(_parted_state(optimizer, state))


def _parted_state(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """The state of an optimizer, tensors shaped as their parameter parted as that is.

    Raises:
        ValueError: A tensor has another shape: nobody knows how it is parted.
    """
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    of = dict(zip(numbers, parameters, strict=True))

    def parted(name: str, value: Any, parameter: Tensor) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        if value.shape != parameter.shape:
            raise ValueError(f"{type(optimizer).__name__} keeps {name} of another shape than its parameter")
        return parted_like(value, parameter)

    parts = {
        n: {name: parted(name, value, of[n]) for name, value in held.items()} for n, held in state["state"].items()
    }
    return {**state, "state": parts}


@dataclass(frozen=True, slots=True, eq=False)
class _Unit:
    """A module whose parameters are gathered together.

    Attributes:
        module: The module.
        kind: Its class before.
        before: Numbers of the hooks that gather.
        after: Numbers of the hooks that let go.
    """

    module: nn.Module
    kind: type[nn.Module]
    before: frozenset[int]
    after: frozenset[int]


@dataclass(frozen=True, slots=True, eq=False)
class _Place:
    """Where a parameter is, parted and whole."""

    module: nn.Module
    name: str
    parted: nn.Parameter
    whole: nn.Parameter


class _Sharding:
    """What was done to a task, so that it can be undone for a while."""

    def __init__(self, units: Sequence[_Unit], methods: Sequence[str]) -> None:
        self.units, self.methods = units, methods
        self.places: list[_Place] = []  # of whole parameters, while they are there


def shard(task: LightningModule, mesh: DeviceMesh, methods: Sequence[str] = ("training_step",)) -> None:
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
    blocks = [module for module in reversed(list(task.modules())) if type(module).__name__ in UNITS]
    _require_apart(blocks)
    units = [_parted(module, mesh, changed) for module in blocks]
    # let go after each forward pass, too: not every one has a backward pass behind it, and what stays is out of date
    units.append(_parted(task, mesh, changed, reshard_after_forward=True))
    for name in methods:
        register_fsdp_forward_method(task, name)
    vars(task)[_RECORD] = _Sharding(units, methods)


def _parted(
    module: nn.Module, mesh: DeviceMesh, ignored: set[nn.Parameter], *, reshard_after_forward: bool | None = None
) -> _Unit:
    kind, before, after = type(module), set(module._forward_pre_hooks), set(module._forward_hooks)
    fully_shard(module, mesh=mesh, ignored_params=ignored, reshard_after_forward=reshard_after_forward)
    added = frozenset(module._forward_pre_hooks) - before, frozenset(module._forward_hooks) - after
    return _Unit(module, kind, *added)


def _require_equal(task: LightningModule) -> None:
    own = weights_hashes(dict(task.named_parameters()))
    if any(other != own for other in all_gather_items([own])):
        raise ValueError("ranks begin with other weights: set --seed_everything, and give all of them the same files")


def _require_apart(blocks: Sequence[nn.Module]) -> None:
    owners: dict[nn.Parameter, nn.Module] = {}
    for block in blocks:
        for name, parameter in block.named_parameters():
            owner = owners.setdefault(parameter, block)
            if owner is not block and owner not in set(block.modules()):
                raise ValueError(f"two blocks share {name}, and it cannot be shared out: take --trainer.strategy ddp")


def _record(task: nn.Module) -> _Sharding | None:
    found: _Sharding | None = vars(task).get(_RECORD)
    return found


def own_class(task: nn.Module) -> type[nn.Module]:
    """The class of a task as it was before its parameters were parted."""
    record = _record(task)
    return type(task) if record is None else record.units[-1].kind


@contextmanager
def whole_weights(task: LightningModule) -> Iterator[None]:
    """Within it the modules of a task are as if nothing were parted, for reading; all ranks have to enter.

    Their parameters are whole, and other objects than those in training; what is changed in them is forgotten.
    """
    record = _record(task)
    if record is None or record.places:  # nothing to do, or done already
        yield
        return
    with ExitStack() as back:
        for unit in record.units:
            back.callback(
                _become, unit.module, type(unit.module), unit.module._forward_pre_hooks, unit.module._forward_hooks
            )
            hooks = unit.module._forward_pre_hooks, unit.module._forward_hooks
            without = [_but(found, ours) for found, ours in zip(hooks, (unit.before, unit.after), strict=True)]
            _become(unit.module, unit.kind, *without)
        for name in record.methods:
            back.callback(vars(task).__setitem__, name, vars(task).pop(name))
        record.places = _gather(task)
        back.callback(record.places.clear)
        back.callback(_put, record.places, whole=False)
        _put(record.places, whole=True)
        yield


@contextmanager
def parted_weights(task: LightningModule) -> Iterator[None]:
    """Within `whole_weights` once more the parameters in training, for those who save them."""
    record = _record(task)
    places = [] if record is None else record.places
    _put(places, whole=False)
    try:
        yield
    finally:
        _put(places, whole=True)


def _gather(task: LightningModule) -> list[_Place]:
    """Whole parameters for parted ones. Those that are shared stay so."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    places = []
    for module in task.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not is_parted(parameter):
                continue
            if parameter not in made:
                made[parameter] = nn.Parameter(whole(parameter), requires_grad=parameter.requires_grad)
            places.append(_Place(module, name, parameter, made[parameter]))
    return places


def _put(places: Sequence[_Place], *, whole: bool) -> None:
    for place in places:
        place.module._parameters[place.name] = place.whole if whole else place.parted


def _become(module: nn.Module, kind: type[nn.Module], before: Any, after: Any) -> None:
    module.__class__ = kind
    module._forward_pre_hooks, module._forward_hooks = before, after


def _but(hooks: Mapping[int, Callable[..., Any]], numbers: frozenset[int]) -> OrderedDict[int, Callable[..., Any]]:
    return OrderedDict((number, hook) for number, hook in hooks.items() if number not in numbers)


class WholeWeights(Callback):
    """Validation and tests of a sharded model see it whole (`whole_weights`); the task attaches it itself."""

    def __init__(self) -> None:
        self._open = ExitStack()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather, after averages were swapped in."""
        self._open.enter_context(whole_weights(pl_module))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go. What is saved before that is right all the same (`parted_weights`)."""
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
    return _record(task) is not None
