"""Low-rank adapters (LoRA, arXiv 2106.09685): several named ones on one network, and the network seen through each.

Student, teacher, averaged target, discriminator and fake score are views of one copy of the weights, each with its own
adapters switched on. The only file of this package that imports peft.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from distill.condition import Condition
from distill.denoiser import Denoiser
from distill.merged import MergedForward
from distill.method import Networks

TLCM_LORA_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip
ATTENTION_LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
FLOW_LORA_TARGETS = (
    *ATTENTION_LORA_TARGETS, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
    "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out",
)  # fmt: skip
STUDENT, TARGET = "student", "target"
ADAPTABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, BaseTunerLayer)

_structure_version = 0  # raised whenever a network gets new adapter layers, so that views look for them again


class _Linear(MergedForward, lora.Linear): ...


class _Conv2d(MergedForward, lora.Conv2d): ...


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """Shape of a low-rank adapter.

    Attributes:
        rank: r of the update ``alpha / r * B A``.
        alpha: PEFT's default 8 is what the released checkpoints were trained with, whatever their rank.
        targets: Endings of the names of the adapted layers; default TLCM's list (arXiv 2406.05768), which LCM-LoRA uses
            too. ``ATTENTION_LORA_TARGETS`` at rank 16 has the 3.3M parameters of HiPA (arXiv 2311.18158) on SD 2;
            ``FLOW_LORA_TARGETS`` names the layers of SD3 and FLUX.

    Raises:
        ValueError: Rank is not positive, or alpha is negative.
    """

    rank: int = 64
    alpha: float = 8.0
    targets: tuple[str, ...] = TLCM_LORA_TARGETS

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha >= 0:
            raise ValueError(f"a LoRA needs rank >= 1 and alpha >= 0, got {self}")

    def to_peft(self) -> LoraConfig:
        """The same as a ``peft.LoraConfig`` (B starts at zero: no effect before training)."""
        config = LoraConfig(
            r=self.rank, lora_alpha=cast(int, self.alpha), target_modules=list(self.targets), init_lora_weights=True
        )
        config._register_custom_module({nn.Linear: _Linear, nn.Conv2d: _Conv2d})  # same weights and names
        return config

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return {"rank": self.rank, "alpha": self.alpha, "targets": list(self.targets)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> LoraSettings:
        """The settings that ``to_json`` gave."""
        return cls(rank=int(values["rank"]), alpha=float(values["alpha"]), targets=tuple(values["targets"]))


def add_lora(
    network: nn.Module, settings: LoraSettings, name: str = "default", *, trainable: bool = True, active: bool = True
) -> tuple[str, ...]:
    """Put a new adapter on the layers that the settings name; the output does not change until it is trained.

    The network's own weights are frozen; other adapters stay as they are, trained or not, on or off. Adapter weights
    are float32, whatever the network's precision, so that small updates are not lost.

    Args:
        network: Any module. diffusers networks inside it learn of the adapter as if by their ``add_adapter``.
        settings: Rank, alpha and targets.
        name: Name of the adapter, new to the network.
        trainable: Whether its parameters require gradients.
        active: Whether it is switched on where no view says otherwise, beside those that are.

    Returns:
        The targets that no layer answered to, for instance ``conv_shortcut`` where no block changes its width.

    Raises:
        ValueError: No layer matches any target, or the name is taken.
    """
    global _structure_version
    if name in adapter_names(network):
        raise ValueError(f"the network already has an adapter {name!r}")
    hosts = [host for host in _hosts(network) if _matched(host, settings.targets)]
    if not hosts:
        raise ValueError(f"no layer of {type(network).__name__} matches any LoRA target of {list(settings.targets)}")
    others = {parameter: parameter.requires_grad for layer in _layers(network) for parameter in _own(layer)}
    before = active_adapters(network)
    for host in hosts:
        with warnings.catch_warnings():
            # It warns of a second adapter, which is what is wanted here.
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            # This is what diffusers' add_adapter calls; its bookkeeping is one flag.
            inject_adapter_in_model(settings.to_peft(), host, name)
        if hasattr(host, "_hf_peft_config_loaded"):
            cast(Any, host)._hf_peft_config_loaded = True
    network.requires_grad_(False)
    for parameter, required in others.items():
        parameter.requires_grad_(required)
    for parameter in adapter_parameters(network, name):
        parameter.requires_grad_(trainable)
        parameter.data = parameter.data.float()
    _structure_version += 1
    set_active_adapters(network, (*before, name) if active else before)
    matched = set().union(*(_matched(host, settings.targets) for host in hosts))
    return tuple(target for target in settings.targets if target not in matched)


def adapter_names(network: nn.Module) -> tuple[str, ...]:
    """Names of all adapters anywhere in the network, in the order of their addition."""
    return tuple(dict.fromkeys(name for layer in _layers(network) for name in layer.lora_A))


def active_adapters(network: nn.Module) -> tuple[str, ...]:
    """Names of the adapters that are switched on."""
    on = (name for layer in _layers(network) if not layer.disable_adapters for name in layer.active_adapters)
    existing = adapter_names(network)
    return tuple(name for name in dict.fromkeys(on) if name in existing)


def adapter_parameters(network: nn.Module, name: str) -> Iterator[nn.Parameter]:
    """The parameters of one adapter, layer by layer."""
    for layer in _layers(network):
        yield from _own(layer, name)


def set_active_adapters(network: nn.Module, names: Sequence[str]) -> None:
    """Switch on exactly these adapters, from now on. Unlike peft's own switch it changes no ``requires_grad``."""
    _check_names(network, names)
    _switch(_layers(network), tuple(names))


@contextmanager
def using_adapters(network: nn.Module, *names: str) -> Iterator[None]:
    """Switch on exactly these adapters (none: the bare network) inside a ``with`` block.

    Nests. With diffusers' gradient checkpointing the backward pass repeats each forward with the adapters it had.

    Raises:
        ValueError: The network has no adapter of a name.
    """
    _check_names(network, names)
    _mark_checkpoints(_checkpointing_parts(network))
    with _switched(_layers(network), names):
        yield


class AdapterView(Denoiser):
    """A denoiser with a fixed choice of its adapters, whatever else is switched on outside.

    Views are cheap and share all weights. Only a view made with ``owns=True`` has the denoiser as a submodule, so that
    of several views in one training task one shows parameters, moves to devices and saves; the others show none.

    Args:
        denoiser: The shared denoiser.
        names: Adapters that are on in this view; none gives the bare network.
        owns: Whether the denoiser is registered as a submodule.

    Raises:
        ValueError: The denoiser has no adapter of a name.
    """

    def __init__(self, denoiser: Denoiser, names: Sequence[str] = (), *, owns: bool = False) -> None:
        super().__init__(denoiser.schedule, denoiser.prediction_type)
        _check_names(denoiser, names)
        self.names = tuple(names)
        self.network = denoiser if owns else None
        self._shared = (denoiser,)  # in a tuple, where nn.Module does not look for submodules
        self._parts: tuple[int, list[BaseTunerLayer], list[nn.Module]] = (-1, [], [])

    @property
    def denoiser(self) -> Denoiser:
        """The denoiser behind the view."""
        return self._shared[0]

    def parameters_of_view(self) -> Iterator[nn.Parameter]:
        """Parameters of the adapters that are on in this view."""
        for name in self.names:
            yield from adapter_parameters(self.denoiser, name)

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The denoiser's raw prediction with this view's adapters; see ``Denoiser.forward``."""
        if self._parts[0] != _structure_version:
            self._parts = (_structure_version, _layers(self.denoiser), _checkpointing_parts(self.denoiser))
        _, layers, parts = self._parts
        _mark_checkpoints(parts)
        with _switched(layers, self.names):
            output: Tensor = self.denoiser(x_t, t, condition)
        return output


def adapter_state_dict(network: nn.Module, name: str) -> dict[str, Tensor]:
    """One adapter's weights under PEFT's names, without the adapter's own; layers named as seen from ``network``.

    Raises:
        ValueError: There is no such adapter.
    """
    _check_names(network, [name])
    state: dict[str, Tensor] = {}
    for prefix, host in _named_hosts(network):
        if name in getattr(host, "peft_config", {}):
            own = get_peft_model_state_dict(host, adapter_name=name)
            state.update({prefix + key: value for key, value in own.items()})
    return state


def load_adapter_state_dict(network: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Load what ``adapter_state_dict`` gave into an adapter of the same shape.

    Raises:
        ValueError: Keys are missing or unknown, or shapes differ.
    """
    expected = adapter_state_dict(network, name)
    wrong = sorted(
        key
        for key in expected.keys() | state.keys()
        if key not in state or key not in expected or state[key].shape != expected[key].shape
    )
    if wrong:
        raise ValueError(f"these weights do not fit adapter {name!r}: {len(wrong)} keys differ, first {wrong[:5]}")
    for prefix, host in _named_hosts(network):
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if name in getattr(host, "peft_config", {}):
            set_peft_model_state_dict(host, own, adapter_name=name)


class _AdapterCheckpoint:
    """A gradient checkpointing function under which the repeated forward uses the adapters of the first one."""

    def __init__(self, network: nn.Module, checkpoint: Callable[..., Any]) -> None:
        self.network = (network,)
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        layers = _layers(function) if isinstance(function, nn.Module) else _layers(self.network[0])
        names = tuple(layers[0].active_adapters) if layers and not layers[0].disable_adapters else ()
        return self.checkpoint(_Rerun(function, layers, names), *args)


class _Rerun:
    """A block with its adapters; diffusers' checkpointing asks for ``__call__``."""

    def __init__(self, function: Callable[..., Any], layers: list[BaseTunerLayer], names: tuple[str, ...]) -> None:
        self.function, self.layers, self.names = function, layers, names

    def __call__(self, *args: Any) -> Any:
        with _switched(self.layers, self.names):
            return self.function(*args)


def _checkpointing_parts(network: nn.Module) -> list[nn.Module]:
    """Blocks of diffusers networks that can checkpoint; whether they do may change at any time."""
    return [module for module in network.modules() if hasattr(module, "gradient_checkpointing")]


def _mark_checkpoints(parts: Sequence[nn.Module]) -> None:
    for part in parts:
        function = getattr(part, "_gradient_checkpointing_func", None)
        if function is not None and not isinstance(function, _AdapterCheckpoint):
            cast(Any, part)._gradient_checkpointing_func = _AdapterCheckpoint(part, function)


@contextmanager
def _switched(layers: Sequence[BaseTunerLayer], names: Sequence[str]) -> Iterator[None]:
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    _switch(layers, names)
    try:
        yield
    finally:
        for layer, (active, disabled) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled


def _switch(layers: Sequence[BaseTunerLayer], names: Sequence[str]) -> None:
    # peft's set_adapter also flips requires_grad, which would untrain the student at every look at the teacher.
    for layer in layers:
        layer._active_adapter, layer._disable_adapters = list(names), not names


def _layers(network: nn.Module) -> list[BaseTunerLayer]:
    return [module for module in network.modules() if isinstance(module, BaseTunerLayer)]


def _own(layer: BaseTunerLayer, name: str | None = None) -> Iterator[nn.Parameter]:
    for kind in layer.adapter_layer_names:
        members = getattr(layer, kind)
        for key in members:
            if name in (None, key):
                yield from [members[key]] if isinstance(members[key], nn.Parameter) else members[key].parameters()


def _named_hosts(network: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules that keep adapters of their own (diffusers networks), else the network itself."""
    found = [(path, module) for path, module in network.named_modules() if hasattr(module, "add_adapter")]
    outer = [(p, m) for p, m in found if not any(p != q and (q == "" or p.startswith(q + ".")) for q, _ in found)]
    yield from ((path + "." if path else "", module) for path, module in outer or [("", network)])


def _hosts(network: nn.Module) -> list[nn.Module]:
    return [host for _, host in _named_hosts(network)]


def _matched(network: nn.Module, targets: Sequence[str]) -> set[str]:
    """The targets that an adaptable layer of the network answers to."""
    names = [name for name, module in network.named_modules() if isinstance(module, ADAPTABLE)]
    return {target for target in targets if any(name == target or name.endswith("." + target) for name in names)}


def _check_names(network: nn.Module, names: Sequence[str]) -> None:
    known = adapter_names(network)
    for name in names:
        if name not in known:
            raise ValueError(f"the network has no adapter {name!r}, only {list(known)}")


def networks_for(
    denoiser: Denoiser,
    settings: LoraSettings | None = None,
    *,
    target_decay: float | None = None,
    student: Denoiser | None = None,
) -> Networks:
    """Student, teacher and target for one run.

    With ``settings`` all are views of one copy: the teacher is the denoiser as it is given, the student has the adapter
    "student" on top, the target, if averaged, the adapter "target". Without, teacher and target are copies.

    Args:
        denoiser: The network to distil; it becomes part of the student and is changed by training.
        settings: The adapter; None trains all weights.
        target_decay: Not None: the target is an average of the student, see ``update_target``. None: it is the student.
        student: A network of another shape that learns in the denoiser's place, such as ``models.hear_guidance`` makes;
            trains all its weights.

    Raises:
        ValueError: No layer matches a target of the settings, the denoiser has been given out before, or a student of
            another shape is to have an adapter.
    """
    if settings is None:
        learner = denoiser if student is None else student
        teacher = (copy.deepcopy(denoiser) if student is None else denoiser).requires_grad_(False).eval()
        target = learner if target_decay is None else copy.deepcopy(learner).requires_grad_(False).eval()
        return Networks(student=learner.requires_grad_(True), teacher=teacher, target=target)
    if student is not None:
        raise ValueError("a student of another shape than its teacher cannot be an adapter on it: train all weights")
    base = active_adapters(denoiser)
    for parameter in denoiser.parameters():
        parameter.requires_grad_(False)
    add_lora(denoiser, settings, STUDENT)
    student = AdapterView(denoiser, (*base, STUDENT), owns=True)
    teacher_view = AdapterView(denoiser, base)
    if target_decay is None:
        return Networks(student=student, teacher=teacher_view, target=student)
    add_lora(denoiser, settings, TARGET, trainable=False, active=False)
    load_adapter_state_dict(denoiser, adapter_state_dict(denoiser, STUDENT), TARGET)
    return Networks(student=student, teacher=teacher_view, target=AdapterView(denoiser, (*base, TARGET)))


@torch.no_grad()
def update_target(networks: Networks, decay: float) -> None:
    """``target <- decay target + (1 - decay) student``, over what is trained; nothing where the target is the student.

    For adapters A and B are averaged each, as averages of LoRA weights are everywhere: their product is not the average
    of the products, but differs from it in second order of the change per step only.

    Args:
        networks: From ``networks_for``.
        decay: In [0, 1]; 0 copies the student.

    Raises:
        ValueError: ``decay`` lies outside [0, 1].
    """
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"decay must lie in [0, 1], got {decay}")
    student, target = networks.student, networks.target
    if target is student:
        return
    if isinstance(student, AdapterView) and isinstance(target, AdapterView):
        sources: list[Tensor] = list(adapter_parameters(student.denoiser, student.names[-1]))
        averages: list[Tensor] = list(adapter_parameters(target.denoiser, target.names[-1]))
    else:
        sources, averages = list(student.parameters()), list(target.parameters())
        for average, source in zip(target.buffers(), student.buffers(), strict=True):
            average.copy_(source)
    torch._foreach_lerp_(averages, sources, 1.0 - decay)
