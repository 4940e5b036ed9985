"""Number formats: which multiplies fastest here, and which a module computes in."""

from __future__ import annotations

import torch
from torch import nn


def quick_dtype(device: torch.device) -> torch.dtype:
    """bfloat16; float32 on CPUs without matrix units, where bfloat16 is from slower to twenty times as slow."""
    if device.type == "cpu" and not torch.cpu._is_amx_tile_supported():
        return torch.float32
    return torch.bfloat16


def dtype_of(module: nn.Module) -> torch.dtype:
    """Floating-point type of a module's weights: what its inputs are brought to at its border."""
    return next(parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())
