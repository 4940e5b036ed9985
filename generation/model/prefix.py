"""What stands before the image tokens: a caption's features, or a class.

Legend: B images, L caption tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from generation.model.shapes import CaptionShape

NULL_SEED = 0
"""Seed of the fixed null caption, so that every run and every size of a model has the same one."""


class CaptionPrefix(nn.Module):
    """Features of a text encoder through a two-layer perceptron (tanh-GELU, no biases).

    Args:
        shape: Of the captions.
        width: D.
    """

    def __init__(self, shape: CaptionShape, width: int) -> None:
        super().__init__()
        self.shape = shape
        self.fc1 = nn.Linear(shape.dim, width, bias=False)
        self.fc2 = nn.Linear(width, width, bias=False)
        null = torch.empty(shape.length, shape.dim)
        noise = torch.randn(null.shape, generator=torch.Generator().manual_seed(NULL_SEED), device="cpu")
        null.copy_(noise * shape.dim**-0.5)  # N(0, 1) / sqrt(dim), LlamaGen; nothing happens on the meta device
        self.null: Tensor
        if shape.null == "learned":
            self.null = nn.Parameter(null)
        else:
            self.register_buffer("null", null)

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, L, dim) -> (B, L, D)."""
        return self.fc2(F.gelu(self.fc1(features.to(self.null.dtype)), approximate="tanh"))

    def unconditional(self, features: Tensor) -> Tensor:
        """The null caption in the place of captions (B, L, dim): its last L tokens, as captions are padded on the left.

        Raises:
            ValueError: If L is longer than a caption may be.
        """
        length = features.shape[1]
        if length > self.shape.length:
            raise ValueError(f"a caption has at most {self.shape.length} tokens, got {length}")
        return self.null[self.shape.length - length :].to(features.dtype).expand_as(features)

    def drop(self, features: Tensor, dropped: Tensor) -> Tensor:
        """Replace captions (B, L, dim) by the null caption where ``dropped`` (B,) is true."""
        return torch.where(dropped[:, None, None], self.unconditional(features), features)


class ClassPrefix(nn.Module):
    """One token for a class; one more stands for "none".

    Args:
        num_classes: Number of classes.
        width: D.
    """

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be positive, got {num_classes}")
        self.num_classes = num_classes
        self.embedding = nn.Embedding(num_classes + 1, width)

    def forward(self, labels: Tensor) -> Tensor:
        """Labels (B,) -> (B, 1, D)."""
        return self.embedding(labels)[:, None]

    def unconditional(self, labels: Tensor) -> Tensor:
        """The label that stands for "none", as often as there are labels (B,)."""
        return torch.full_like(labels, self.num_classes)

    def drop(self, labels: Tensor, dropped: Tensor) -> Tensor:
        """Replace labels (B,) by "none" where ``dropped`` (B,) is true."""
        return torch.where(dropped, self.unconditional(labels), labels)
