"""One generator for each image, so that a picture depends on its own randomness alone."""

from __future__ import annotations

import torch

from distill.noise import require_generators
from layton.interface import Generators


def image_generators(generator: Generators | None, count: int) -> list[torch.Generator]:
    """One generator for each image: those given, or new ones seeded by the one given, or with 0, 1, 2 ...

    Raises:
        ValueError: If another number of generators is given.
    """
    if generator is None:
        return [torch.Generator().manual_seed(seed) for seed in range(count)]
    if isinstance(generator, torch.Generator):
        return [generator] if count == 1 else [child_generator(generator) for _ in range(count)]
    require_generators(generator, count)
    return list(generator)


def child_generator(generator: torch.Generator) -> torch.Generator:
    """A CPU generator seeded by one number of another."""
    seed = torch.randint(2**62, (1,), generator=generator, device=generator.device)
    return torch.Generator().manual_seed(int(seed))
