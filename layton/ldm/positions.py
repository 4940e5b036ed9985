"""Makes a convolutional UNet find out where in the picture each of its cells is.

A UNet has no positions; all that its cells can know of them comes from the zeros around the picture, passed on from
convolution to convolution. Prompts that say where objects stand ask its cross-attention for just that, but as long as
nothing needs positions nothing passes them on, so nothing is learnt from such prompts (measured: after 1,000 steps of
32 wrong places gave the same loss as right ones). A linear reading of the cells' positions, learnt beside the diffusion
loss and thrown away after it, gets this started; positions by padding are those of arXiv 2001.08248.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F

_WAVES = 4


class PositionReader(nn.Module):
    """Reads places off what the cross-attentions of a UNet ask with, from its middle on.

    Args:
        unet: Hooks are put on it, which see every forward pass.

    Raises:
        ValueError: If it has no cross-attention there.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        asked: list[tuple[nn.Module, Tensor]] = []

        def keep(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if torch.is_grad_enabled():
                asked.append((module, inputs[0]))

        attentions = [
            cast(Any, module)
            for name, module in unet.named_modules()
            if name.endswith(".attn2") and not name.startswith("down_blocks.")
        ]
        if not attentions:
            raise ValueError("a UNet without cross-attention in its middle and upper blocks is not told places")
        for attention in attentions:
            attention.register_forward_pre_hook(keep)
        self.heads = nn.ModuleList(nn.Linear(attention.to_q.in_features, 2 * _WAVES) for attention in attentions)
        self._asked, self._attentions = asked, tuple(attentions)  # in a tuple: no part of this module

    def forget(self) -> None:
        """Before a forward pass whose `loss` is asked for."""
        self._asked.clear()

    def loss(self) -> Tensor:
        """Squared error of the places read in the forward pass since `forget`, (); 0.5 for one who knows nothing.

        Raises:
            ValueError: If there was none, or more than one.
        """
        if len(self._asked) != len(self.heads):
            raise ValueError(f"one forward pass has {len(self.heads)} cross-attentions, kept were {len(self._asked)}")
        losses = []
        for module, hidden in self._asked:
            read = self.heads[self._attentions.index(module)](hidden.float())
            losses.append(F.mse_loss(read, places(hidden.shape[1], hidden.device).expand_as(read)))
        self.forget()
        return torch.stack(losses).mean()


def places(cells: int, device: torch.device | str) -> Tensor:
    """Cosines of the places of a square grid's cells, row by row, (cells, 8): four of x, four of y."""
    side = math.isqrt(cells)
    if side * side != cells:
        raise ValueError(f"cells of a square grid are wanted, got {cells}")
    middle = (torch.arange(side, device=device) + 0.5) / side
    waves = torch.cos(math.pi * middle[:, None] * torch.arange(1, _WAVES + 1, device=device))
    return torch.cat([waves.repeat(side, 1), waves.repeat_interleave(side, dim=0)], dim=1)
