"""Smaller weights for decoding: int8 on a CPU, bfloat16 anywhere.

Decoding reads every weight once for each code and does little with it, so that bytes are what costs.
"""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from generation.model.transformer import LaytonGenTransformer
from generation.model.vocabulary import FullVocabulary
from generation.model.weight_types import Weights
from layton.devices import choose_device

INT8_MAX = 127.0  # of inputs, and of weights where the CPU sums products in 32 bits
_INT7_MAX = 63.0  # of weights elsewhere: there two products meet in 16 bits, 2 * 255 * 64 < 2^15
_ZERO_POINT = 128  # inputs are unsigned, -127..127 lies in 1..255


class Int8Linear(nn.Module):
    """A linear layer with 8-bit weights and inputs, both symmetric: one scale for each output and for each row.

    Rows have scales of their own, and sums of integers are exact, so that a row's result does not depend on what other
    rows are in the batch. For inference on a CPU; one without VNNI instructions, which would clip sums of products of
    8 bits, keeps 7 bits of the weights. Its state is ``weight`` (out, in) int8, ``scale`` (out,) float32 and,
    where there is one, ``bias`` (out,) float32.

    Args:
        linear: The layer to replace; its weights must be finite. One on the meta device gives a layer that only waits
            for its state.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias: Tensor | None
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float())
        self._product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
        self._packed: Any = None
        weight = linear.weight.detach().float()
        if not weight.is_meta:
            scale = (weight.abs().amax(dim=1) / weight_max()).clamp_min(1e-12)
            self._pack(torch.quantize_per_channel, weight, scale, dtype=torch.qint8)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features) float32."""
        largest = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True).clamp_min(1e-12)
        result: Tensor = self._product(x / largest, 1.0 / INT8_MAX, _ZERO_POINT, self._packed).mul_(largest)
        return result if self.bias is None else result + self.bias

    def _pack(self, quantize: Callable[..., Tensor], weight: Tensor, scale: Tensor, **options: Any) -> None:
        zero_points = torch.zeros(len(scale), dtype=torch.int64)
        with warnings.catch_warnings():
            # torch 2.14 means to drop quantized tensors some day, and has no other way into its int8 product yet
            warnings.simplefilter("ignore", UserWarning)
            self._packed = torch.ops.quantized.linear_prepack(
                quantize(weight, scale.double(), zero_points, axis=0, **options), None
            )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._packed is None:
            weight = torch.empty(self.out_features, self.in_features, dtype=torch.int8, device="meta")
            scale = torch.empty(self.out_features, device="meta")
        else:
            quantized, _ = torch.ops.quantized.linear_unpack(self._packed)
            weight, scale = quantized.int_repr(), quantized.q_per_channel_scales().float()
        destination[f"{prefix}weight"], destination[f"{prefix}scale"] = weight, scale

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        weight, scale = (state_dict.pop(f"{prefix}{name}", None) for name in ("weight", "scale"))
        if weight is None or scale is None:
            raise ValueError(f"{prefix} has no int8 weight and scale")
        if weight.dtype != torch.int8 or weight.shape != (self.out_features, self.in_features):
            raise ValueError(f"{prefix}weight is {weight.dtype} {tuple(weight.shape)}, expected int8")
        if weight_max() == _INT7_MAX and weight.abs().max() > _INT7_MAX + 1:
            weight, scale = (weight.float() / 2).round().to(torch.int8), scale * 2
        self._pack(torch._make_per_channel_quantized_tensor, weight, scale)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def weight_max() -> float:
    """Largest 8-bit weight whose products this CPU is known to sum exactly."""
    return INT8_MAX if torch.cpu._is_vnni_supported() or platform.machine() in ("aarch64", "arm64") else _INT7_MAX


def quantize_int8(model: LaytonGenTransformer) -> LaytonGenTransformer:
    """Replace the linear layers of all blocks, and a full head, by `Int8Linear`, in place.

    Embeddings, norms and the low-rank layers of a factored vocabulary stay as they are. The model can then only infer,
    on a CPU. Saved, it loads as the same int8 model, from a file of about a quarter of the size.

    Args:
        model: On the CPU, in float32.

    Returns:
        The same model, in eval mode.

    Raises:
        ValueError: If weights are not float32 on the CPU.
    """
    weight = next(model.parameters())
    if weight.device.type != "cpu":
        raise ValueError(f"int8 weights run on a CPU only, the model is on {weight.device}")
    if weight.dtype != torch.float32:
        raise ValueError(f"int8 weights are made from float32 ones, the model is {weight.dtype}")
    return replace_linears(model).eval()


def weights_type(model: LaytonGenTransformer) -> str:
    """``int8``, or the name of the type of its weights, such as ``float32``."""
    return "int8" if model.config.get("int8") else str(next(model.parameters()).dtype).removeprefix("torch.")


def require_place(model: LaytonGenTransformer, device: torch.device) -> None:
    """Stop before int8 weights are moved to where they cannot run.

    Raises:
        ValueError: It is no CPU.
    """
    if model.config.get("int8") and device.type != "cpu":
        raise ValueError(f"int8 weights run on a CPU only, the model is to run on {device}")


def choose_place(model: LaytonGenTransformer, weights: Weights | None, device: str | None) -> torch.device:
    """Where a model is to decode in a type of weights: on the accelerator if there is one, with int8 on the CPU.

    Args:
        model: As it was saved.
        weights: What it is brought to; None leaves it as it is.
        device: Taken at its word, if one is named.
    """
    on_cpu = device is None and "int8" in (weights, weights_type(model))
    return torch.device("cpu") if on_cpu else choose_device(device)


def set_weights(model: LaytonGenTransformer, weights: Weights) -> LaytonGenTransformer:
    """Bring a model's weights into a type for decoding, in place.

    Args:
        model: Where it is to run.
        weights: The type.

    Returns:
        The same model.

    Raises:
        ValueError: ``int8`` elsewhere than on a CPU, or another type for a model that is saved as int8.
    """
    if model.config.get("int8"):
        if weights != "int8":
            raise ValueError(f"the model is saved with int8 weights, which cannot become {weights}")
        return model
    if weights == "int8":
        return quantize_int8(model.float())
    return model.to(torch.float32 if weights == "fp32" else torch.bfloat16)


def replace_linears(model: LaytonGenTransformer) -> LaytonGenTransformer:
    """Put an `Int8Linear` in place of every linear layer of which `quantize_int8` speaks.

    Args:
        model: Changed in place; its ``config`` says so from then on. On the meta device, the layers wait for state.
    """
    for block in model.blocks:
        for part in (block.attention, block.ffn):
            for name, layer in list(part.named_children()):  # type: ignore[union-attr]
                if isinstance(layer, nn.Linear):
                    setattr(part, name, Int8Linear(layer))
    if isinstance(model.vocabulary, FullVocabulary) and isinstance(model.vocabulary.head, nn.Linear):
        model.vocabulary.head = Int8Linear(model.vocabulary.head)
    model.config["int8"] = True
    return model
