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
    require_generators(generator, x.shape[0])
    return torch.stack([gaussian_like(sample, one) for sample, one in zip(x, generator, strict=True)])


def require_generators(generators: Sequence[torch.Generator], count: int) -> None:
    """Refuse what is not one generator for each of ``count`` samples.

    Raises:
        ValueError: A seed, or another number of generators.
    """
    if isinstance(generators, int):
        raise ValueError(f"generator must be a torch.Generator: torch.Generator().manual_seed({generators})")
    if len(generators) != count:
        raise ValueError(f"expected one generator or {count} of them, got {len(generators)}")
