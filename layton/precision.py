"""Number formats: which multiplies fastest here, and which a module computes in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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


@contextmanager
def exact_float32() -> Iterator[None]:
    """Within it GPUs multiply float32 as that, and not as TF32, by which other codes would come out than elsewhere.

    cuDNN's convolutions take TF32 by default, and matrix products in training with mixed precision.
    """
    cudnn, allowed = torch.backends.cudnn, torch.get_float32_matmul_precision()
    enabled, benchmark, deterministic = bool(cudnn.enabled), bool(cudnn.benchmark), bool(cudnn.deterministic)
    torch.set_float32_matmul_precision("highest")
    try:
        with cudnn.flags(enabled=enabled, benchmark=benchmark, deterministic=deterministic, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(allowed)
