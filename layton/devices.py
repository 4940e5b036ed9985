"""Where networks run."""

from __future__ import annotations

import os

import torch

_LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID")


def local_rank() -> int:
    """Number of this process among those of one machine, as its launcher says; 0 for one alone."""
    return int(next((os.environ[name] for name in _LOCAL_RANKS if name in os.environ), 0))


def choose_device(device: str | None) -> torch.device:
    """The device of a name; by default the accelerator if there is one, of several this process's own, else the CPU.

    Raises:
        ValueError: If there is no such device.
    """
    if device is None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        if found is None:
            return torch.device("cpu")
        rank = local_rank()
        return torch.device(found.type, rank) if 0 < rank < torch.accelerator.device_count() else found
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        there = ["cpu", *([] if accelerator is None else [accelerator.type])]
        if device.partition(":")[0] not in there:
            raise ValueError(
                f"no device {device!r} here that torch can use: leave it out, or say {there[-1]}"
            ) from error
        raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
