"""Gaussian noise from explicit generators, the only source of randomness in this package."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator]


def gaussian_like(x: Tensor, generator: Generators) -> Tensor:
    """Standard normal noise shaped like ``x`` (B, ...), on its device and in its dtype.

    Args:
        x: Template (B, ...).
        generator: One generator for the whole batch, or one per sample; with one per sample each sample's noise does
            not depend on what else is in the batch. A generator may live on another device than ``x`` (a CPU one gives
            the same numbers everywhere): noise is drawn where the generator is.

    Raises:
        ValueError: The number of generators is not the batch size.
    """
    if isinstance(generator, torch.Generator):
        return torch.randn(x.shape, generator=generator, device=generator.device, dtype=x.dtype).to(x.device)
    if isinstance(generator, int):
        raise ValueError(f"generator must be a torch.Generator: torch.Generator().manual_seed({generator})")
    if len(generator) != x.shape[0]:
        raise ValueError(f"expected one generator or {x.shape[0]} of them, got {len(generator)}")
    return torch.stack([gaussian_like(sample, one) for sample, one in zip(x, generator, strict=True)])
