"""Where networks run."""

from __future__ import annotations

import torch


def choose_device(device: str | None) -> torch.device:
    """The device of a name; by default the accelerator if there is one, else the processor.

    Raises:
        ValueError: If there is no such device.
    """
    if device is None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found if found is not None else torch.device("cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
