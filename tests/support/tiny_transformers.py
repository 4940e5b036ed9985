"""Tiny transformers with random weights, and captions for them."""

from __future__ import annotations

import torch
from torch import Tensor

from generation.model.shapes import CaptionShape, Dropout, Factors
from generation.model.transformer import LaytonGenTransformer

TOKENS, CODES, LENGTH, DIM = 16, 64, 6, 12


def tiny_model(
    *, factors: Factors | None = None, classes: int | None = None, rotary: str = "identity", null: str = "fixed"
) -> LaytonGenTransformer:
    """2 blocks of width 32; weights large enough that logits differ by whole numbers."""
    torch.manual_seed(0)
    caption = None if classes else CaptionShape(dim=DIM, length=LENGTH, rotary=rotary, null=null)  # type: ignore[arg-type]
    model = LaytonGenTransformer(
        width=32,
        depth=2,
        num_heads=2,
        hidden=64,
        caption=caption,
        num_classes=classes,
        vocab_size=CODES,
        num_tokens=TOKENS,
        factors=factors,
        dropout=Dropout(),
        zero_head=False,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8.0)
    return model.eval()


def captions(batch: int, length: int = LENGTH, *, seed: int = 1) -> Tensor:
    return torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(seed))


def codes(batch: int, *, seed: int = 2) -> Tensor:
    return torch.randint(CODES, (batch, TOKENS), generator=torch.Generator().manual_seed(seed))


def left_padded(features: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Captions (L_i, dim) as one batch, padding filled with large nonsense."""
    length = max(len(each) for each in features)
    batch = torch.full((len(features), length, DIM), 100.0)
    mask = torch.zeros(len(features), length, dtype=torch.bool)
    for row, each in enumerate(features):
        batch[row, length - len(each) :] = each
        mask[row, length - len(each) :] = True
    return batch, mask
