"""Modules that a module uses and does not own.

Teachers, averaged targets, autoencoders and perceptual networks serve a training run without being part of what it
makes. As children they would be trained, saved and counted with it, and `train()` would change their mode. `Held` keeps
one outside of the tree of modules; `held_modules` finds them again, for those who count operations or parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

import torch
from torch import nn

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)


class Held(Generic[T]):
    """A module, or what may be one, that its holder neither trains, moves, saves nor counts.

    Args:
        module: Kept as it is.
        frozen: Freeze it in place and set it to eval mode.
    """

    def __init__(self, module: T, *, frozen: bool = False) -> None:
        self.module = module
        if frozen and isinstance(module, nn.Module):
            module.eval().requires_grad_(False)

    def on(self: Held[M], device: torch.device) -> M:
        """The module, moved to where it is needed; it keeps its dtype."""
        self.module.to(device)
        return self.module


def held_modules(root: nn.Module) -> Iterator[nn.Module]:
    """What ``root`` and the modules below it hold; not what these hold in turn."""
    for module in root.modules():
        for value in vars(module).values():
            if isinstance(value, Held) and isinstance(value.module, nn.Module):
                yield value.module
