"""Smaller weights for decoding: int8 on a CPU, bfloat16 anywhere.

Decoding reads every weight once for each code and does little with it, so that bytes are what costs.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from generation.transformer import LaytonGenTransformer
from generation.vocabulary import FullVocabulary

INT8_MAX = 127.0
_ZERO_POINT = 128  # inputs are unsigned, -127..127 lies in 1..255


class Int8Linear(nn.Module):
    """A linear layer with 8-bit weights and inputs, both symmetric: one scale for each output and for each row.

    Rows have scales of their own, and sums of integers are exact, so that a row's result does not depend on what other
    rows are in the batch. For inference on a CPU.

    Args:
        linear: The layer to replace; its weights must be finite.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(dim=1) / INT8_MAX).clamp_min(1e-12)
        zero_points = torch.zeros(len(scale), dtype=torch.int64)
        with warnings.catch_warnings():
            # torch 2.14 means to drop quantized tensors some day, and has no other way into its int8 product yet
            warnings.simplefilter("ignore", UserWarning)
            quantized = torch.quantize_per_channel(weight, scale.double(), zero_points, axis=0, dtype=torch.qint8)
            self._packed: Any = torch.ops.quantized.linear_prepack(quantized, None)
        self._product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias: Tensor | None = None if linear.bias is None else linear.bias.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features) float32."""
        largest = x.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12)
        result: Tensor = self._product(x / largest, 1.0 / INT8_MAX, _ZERO_POINT, self._packed)
        result = result * largest
        return result if self.bias is None else result + self.bias


def quantize_int8(model: LaytonGenTransformer) -> LaytonGenTransformer:
    """Replace the linear layers of all blocks, and a full head, by `Int8Linear`, in place.

    Embeddings, norms and the low-rank layers of a factored vocabulary stay as they are. The model can then only infer,
    on a CPU; save it before, and quantize after loading.

    Args:
        model: On the CPU.

    Returns:
        The same model, in eval mode.

    Raises:
        ValueError: If weights are not on the CPU.
    """
    device = next(model.parameters()).device
    if device.type != "cpu":
        raise ValueError(f"int8 weights run on a CPU only, the model is on {device}")
    for block in model.blocks:
        for part in (block.attention, block.ffn):
            for name, layer in list(part.named_children()):  # type: ignore[union-attr]
                if isinstance(layer, nn.Linear):
                    setattr(part, name, Int8Linear(layer))
    if isinstance(model.vocabulary, FullVocabulary) and isinstance(model.vocabulary.head, nn.Linear):
        model.vocabulary.head = Int8Linear(model.vocabulary.head)
    return model.eval()
