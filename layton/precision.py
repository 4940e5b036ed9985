"""Number formats: which multiplies fastest here, and which a module computes in."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import nn


def quick_dtype(device: torch.device) -> torch.dtype:
    """bfloat16; float32 on CPUs that do not multiply it, where it is from slower to twenty times as slow."""
    cpu = torch.cpu
    if device.type == "cpu" and not (cpu._is_amx_tile_supported() or cpu._is_avx512_bf16_supported()):
        return torch.float32
    return torch.bfloat16


def dtype_of(module: nn.Module) -> torch.dtype:
    """Floating-point type of a module's weights: what its inputs are brought to at its border."""
    return next(parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())


def exact_convolutions() -> AbstractContextManager[object]:
    """Within it cuDNN multiplies float32 as that, not as TF32, by which other codes would come out than elsewhere."""
    cudnn = torch.backends.cudnn
    return cudnn.flags(
        enabled=bool(cudnn.enabled),
        benchmark=bool(cudnn.benchmark),
        deterministic=bool(cudnn.deterministic),
        allow_tf32=False,
    )
