"""Teaches the UNet of a diffusion pipeline to hear places: beside the diffusion loss, and thrown away after it.

Prompts that say where objects stand (`layton.scenes.placed`) ask two things of a UNet that nothing else asks of it.

Its cells must know where they are. A UNet has no positions; all that its cells can know of them comes from the zeros
around the picture, passed on from convolution to convolution (arXiv 2001.08248). And its cross-attention must look at
the words of the object that lies where the cell is. By the diffusion loss alone neither begins: after 1,000 steps of 32
wrong places gave the same loss as right ones. So positions are read off the cells linearly, and one head of each
cross-attention is told where to look, as TokenCompose does with segmentations (arXiv 2312.03626).

Legend: B prompts, L tokens, N cells of a square grid, row by row, M objects at most.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTokenizer

from layton.ldm.text import knows_places
from layton.scenes.placed import DIAMETER_TOKENS, SQUARE_TOKENS

_WAVES = 4


class PlaceTeacher(nn.Module):
    """Two losses on what the cross-attentions of a UNet ask, from its middle on.

    Args:
        unet: Hooks are put on it, which see every forward pass that is to be learnt from.
        tokenizer: Of the prompts, with the tokens of places.

    Raises:
        ValueError: If the UNet has no cross-attention there, or the tokenizer knows no places.
    """

    sizes: Tensor
    centres: Tensor

    def __init__(self, unet: UNet2DConditionModel, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        kept: list[tuple[Any, Tensor, Tensor]] = []

        def keep(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            if torch.is_grad_enabled():
                kept.append((module, inputs[0], named["encoder_hidden_states"]))

        attentions = [
            cast(Any, module)
            for name, module in unet.named_modules()
            if name.endswith(".attn2") and not name.startswith("down_blocks.")
        ]
        if not attentions:
            raise ValueError("a UNet without cross-attention in its middle and upper blocks is not told places")
        for attention in attentions:
            attention.register_forward_pre_hook(keep, with_kwargs=True)
        self.heads = nn.ModuleList(nn.Linear(attention.to_q.in_features, 2 * _WAVES) for attention in attentions)
        self._kept, self._attentions = kept, tuple(attentions)  # in a tuple: no part of this module
        if not knows_places(tokenizer):
            raise ValueError("the tokenizer does not know the tokens of places")
        known = tokenizer.get_vocab()
        sizes, centres = torch.zeros(len(known)), torch.full((len(known), 2), math.nan)
        for token, size in DIAMETER_TOKENS.items():
            sizes[known[token]] = size
        for token, centre in SQUARE_TOKENS.items():
            centres[known[token]] = torch.tensor(centre)
        self.register_buffer("sizes", sizes, persistent=False)
        self.register_buffer("centres", centres, persistent=False)

    def forget(self) -> None:
        """Before a forward pass whose `losses` are asked for."""
        self._kept.clear()

    def losses(self, tokens: Tensor) -> dict[str, Tensor]:
        """What the forward pass since `forget` has to learn.

        Args:
            tokens: Ids of its prompts (B, L).

        Returns:
            ``position``, the squared error of the places that are read, 0.5 for one who knows nothing; and
            ``attention``, the cross-entropy of where the first head of each cross-attention looks, which shall be the
            last word of the object at the cell, or the first token where there is none. Prompts without places do
            not count for it.

        Raises:
            ValueError: If there was no forward pass, or more than one.
        """
        if len(self._kept) != len(self.heads):
            raise ValueError(f"one forward pass has {len(self.heads)} cross-attentions, kept were {len(self._kept)}")
        positions, looks = [], []
        for attention, hidden, text in self._kept:
            read = self.heads[self._attentions.index(attention)](hidden.float())
            positions.append(F.mse_loss(read, places(hidden.shape[1], hidden.device).expand_as(read)))
            looks.append(_look_loss(attention, hidden, text, self.object_at(tokens, hidden.shape[1])))
        self.forget()
        return {"position": torch.stack(positions).mean(), "attention": torch.stack(looks).mean()}

    def object_at(self, tokens: Tensor, cells: int) -> Tensor:
        """Place in the prompt of the last word of the object at each cell (B, N) int64; 0 for none, -1 without places.

        The object of a cell is the one whose circle touches it; of several the nearest for its size.
        """
        centres = self.centres[tokens]  # (B, L, 2), NaN for tokens that are no square
        sizes = self.sizes[tokens].roll(1, dims=1)  # the diameter is the word before
        middle = _middles(cells, tokens.device)
        grid = torch.stack([middle.repeat(len(middle)), middle.repeat_interleave(len(middle))], dim=1)
        reach = sizes / 2 + math.sqrt(0.5) / len(middle)
        near = (grid - centres[:, :, None]).norm(dim=-1) / reach[:, :, None]  # (B, L, N)
        least, word = near.nan_to_num(math.inf).min(dim=1)
        found = torch.where(least <= 1, word, 0)
        return found.masked_fill(centres[..., :1].isnan().all(1), -1)


def _look_loss(attention: Any, hidden: Tensor, text: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of the first head's attention, of cells with and without an object as two halves."""
    width = attention.to_q.out_features // attention.heads
    query, key = attention.to_q(hidden)[..., :width], attention.to_k(text)[..., :width]
    logits = (query @ key.mT * attention.scale).float()
    losses = F.cross_entropy(logits.flatten(0, 1), target.flatten().clamp_min(0), reduction="none").view_as(target)
    halves = [(losses * part).sum() / part.sum().clamp_min(1) for part in (target > 0, target == 0)]
    return (halves[0] + halves[1]) / 2


def places(cells: int, device: torch.device | str) -> Tensor:
    """Cosines of the places of a square grid's cells, row by row, (N, 8): four of x, four of y."""
    middle = _middles(cells, device)
    waves = torch.cos(math.pi * middle[:, None] * torch.arange(1, _WAVES + 1, device=device))
    return torch.cat([waves.repeat(len(middle), 1), waves.repeat_interleave(len(middle), dim=0)], dim=1)


def _middles(cells: int, device: torch.device | str) -> Tensor:
    side = math.isqrt(cells)
    if side * side != cells:
        raise ValueError(f"cells of a square grid are wanted, got {cells}")
    return (torch.arange(side, device=device) + 0.5) / side
