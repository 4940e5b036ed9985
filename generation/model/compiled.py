"""The decoding step as one compiled graph: Python is left out, and what lies between matrix products becomes one loop.

Small operations are a quarter of the time of one image's step on a CPU. Compiled it takes 0.86 x the time (`layton
bench --what decoding`, models of 38M and 111M), after a wait of a quarter to half a minute for each number of rows, so
it pays for many images one after the other. Needs a C++ compiler, as all of `torch.compile` does on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from generation.model.rope import Rotation
from generation.model.transformer import LaytonGenTransformer


class _Written:
    """Keys and values of one layer within the graph; see `generation.model.cache.LayerMemory`."""

    def __init__(self, keys: Tensor, values: Tensor, place: Tensor, tokens: int) -> None:
        self.keys, self.values, self.place, self.tokens = keys, values, place, tokens

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        # Index assignment stays in place when compiled, a copy into a view becomes a copy of everything.
        self.keys[:, :, self.place] = key
        self.values[:, :, self.place] = value
        return self.keys[:, :, : self.tokens], self.values[:, :, : self.tokens]


class CompiledStep:
    """What `generation.model.cache.CachedDecoder.step` runs for a model that was given to `compile_decoding`.

    Args:
        model: In eval mode; later changes of its weights are not seen.

    Attributes:
        capacity: Tokens that memory has room for: always as many, since each shape is compiled for itself, and one more
            than are fed, since a part that is the whole would be compiled for itself, too.
    """

    def __init__(self, model: LaytonGenTransformer) -> None:
        longest = 1 if model.caption is None else model.caption.length
        self.capacity = longest + model.num_tokens
        # Frozen: weights are constants, which the compiler lays out for so many rows.
        self._graph: Callable[..., Tensor] = torch.compile(_step_of(model), dynamic=False, options={"freezing": True})
        self._count = torch.empty(self.capacity, device=next(model.parameters()).device)

    def __call__(
        self, codes: Tensor, rotation: Rotation, bias: Tensor, control: Tensor, memory: list[Tensor], place: int
    ) -> Tensor:
        """Feed one code for each row.

        Args:
            codes: (R,) int64.
            rotation: Of this place.
            bias: (R, 1, 1, more than ``capacity``), what the last token may see.
            control: (R, 1, D), added to the embedded codes.
            memory: Keys and values of the layers by turns, each (R, K, capacity, hd), of its own memory. Written.
            place: Number of tokens in it.

        Returns:
            Logits of the next code (R, V).
        """
        seen = self._count[: place + 1]
        torch._dynamo.mark_dynamic(seen, 0)  # the one number that grows: otherwise every step would be compiled
        at = torch.tensor([place], device=codes.device)
        # Copies are alike in what graphs are compiled for anew: strides, and whether made in inference mode.
        codes, control = (each.clone(memory_format=torch.contiguous_format) for each in (codes, control))
        return self._graph(codes, rotation.cos, rotation.sin, bias, control, memory, at, seen)


def _step_of(model: LaytonGenTransformer) -> Callable[..., Tensor]:
    def step(
        codes: Tensor,
        cos: Tensor,
        sin: Tensor,
        bias: Tensor,
        control: Tensor,
        memory: list[Tensor],
        place: Tensor,
        seen: Tensor,
    ) -> Tensor:
        tokens = seen.shape[0]
        visible = bias[..., :tokens]
        x = model.vocabulary.embed(codes[:, None]).to(control.dtype) + control
        for block, keys, values in zip(model.blocks, memory[::2], memory[1::2], strict=True):
            x = block(x, Rotation(cos, sin), visible, _Written(keys, values, place, tokens))
        return model.vocabulary.logits(model.norm(x[:, -1]))

    return step


def compile_decoding(model: LaytonGenTransformer) -> LaytonGenTransformer:
    """Have a model's decoding steps compiled, at the first of them for each number of rows (`CompiledStep`).

    Args:
        model: In eval mode, where it is to run. Changed in place; later changes of its weights are not seen.

    Returns:
        The same model.

    Raises:
        ValueError: It is in training mode, has int8 weights, or this machine has no C++ compiler.
    """
    if model.training:
        raise ValueError("a model is compiled for decoding in eval mode, it is in training mode")
    if model.config.get("int8"):
        raise ValueError("int8 weights are decoded as they are: compile float weights, or leave it out")
    if not can_compile(next(model.parameters()).device):
        raise ValueError("compiling needs a C++ compiler, such as g++, and there is none")
    model.compiled_step = CompiledStep(model)
    return model


def can_compile(device: torch.device) -> bool:
    """Whether there is what compiling for a device needs: for a CPU, a C++ compiler."""
    if device.type != "cpu":
        return True
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True
