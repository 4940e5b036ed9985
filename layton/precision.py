"""Which number format multiplies fastest here."""

from __future__ import annotations

import torch


def quick_dtype(device: torch.device) -> torch.dtype:
    """bfloat16; float32 on CPUs without matrix units, where bfloat16 is from slower to twenty times as slow."""
    if device.type == "cpu" and not torch.cpu._is_amx_tile_supported():
        return torch.float32
    return torch.bfloat16
