"""A stand-in for a GPU: `torch.device("standin")` computes on the CPU, but refuses what a GPU would.

Its tensors lie in the CPU's memory, and its kernels are the CPU's (`device.cpp`, compiled at the first import: half a
minute). Tensors of two devices in one operation, or a generator of another device, are errors as on a GPU, so that code
which was only ever run on a CPU shows where it would fail. It says nothing of speed, memory, or rounding.

``pytest -p standin_device`` (with this folder on the path) has everything that chooses a device, and every trainer of
one device, take it.
"""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector
from torch.utils.cpp_extension import load

NAME = "standin"


def _register() -> None:
    built = load("layton_standin", [str(Path(__file__).with_name("device.cpp"))], extra_cflags=["-O1"])
    torch.utils.rename_privateuse1_backend(NAME)
    module: Any = types.ModuleType(f"torch.{NAME}")
    generator = built.default_generator()
    module.is_available = module.is_initialized = lambda: True
    module._is_in_bad_fork = lambda: False
    module.device_count, module.current_device = lambda: 1, lambda: 0
    module.set_device = module.synchronize = module.empty_cache = lambda *_: None
    module.manual_seed = module.manual_seed_all = generator.manual_seed
    module.get_rng_state = lambda *_: generator.get_state()
    module.set_rng_state = lambda state, *_: generator.set_state(state)
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    module.device = _Current
    torch._register_device_module(NAME, module)
    torch.utils.generate_methods_for_privateuse1_backend()


class _Current:
    """``with torch.standin.device(0)``: there is one only."""

    def __init__(self, device: object) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class StandInAccelerator(Accelerator):
    """Lightning's view of it."""

    def setup_device(self, device: torch.device) -> None: ...

    def teardown(self) -> None: ...

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> int:
        return 1

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device(NAME, 0)]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return NAME


def _choose_for_trainers() -> None:
    """Have trainers of one device take it, whatever accelerator they name; with autocast where precision is mixed."""
    connector: Any = _AcceleratorConnector
    begin, strategy, precision = connector.__init__, connector._choose_strategy, connector._check_and_init_precision

    def init(self: Any, *args: Any, accelerator: Any = "auto", devices: Any = "auto", **options: Any) -> None:
        alone = options.get("strategy", "auto") in ("auto", None) and devices in ("auto", 1, "1", -1, "-1")
        if accelerator in ("auto", "cpu") and alone:
            accelerator, devices = NAME, 1
        begin(self, *args, accelerator=accelerator, devices=devices, **options)

    def choose(self: Any) -> Any:
        return SingleDeviceStrategy(torch.device(NAME, 0)) if self._accelerator_flag == NAME else strategy(self)

    def mixed(self: Any) -> Any:
        found = precision(self)
        if isinstance(found, MixedPrecision) and self._accelerator_flag == NAME:
            found.device = NAME
        return found

    connector.__init__, connector._choose_strategy, connector._check_and_init_precision = init, choose, mixed


_register()
AcceleratorRegistry.register(NAME, StandInAccelerator)
_choose_for_trainers()
