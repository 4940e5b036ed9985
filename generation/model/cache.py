"""Decoding one code at a time: keys and values of all earlier tokens are kept in memory that is taken once.

Legend: R rows (images; twice as many with guidance), L caption length, N image tokens, K heads, hd head width,
S = L + N - 1 tokens that are ever fed, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from generation.model.packing import packed, packed_child
from generation.model.rope import Rotation
from generation.model.transformer import LaytonGenTransformer, attention_bias


@dataclass(frozen=True, slots=True, eq=False)
class LayerMemory:
    """Keys and values of one layer during one pass: views of the memory of all layers.

    Each head's tokens lie one after another, so that attention over the first t of them reads one stretch of memory
    and nothing is copied as the sequence grows.

    Attributes:
        keys: (R, K, t, hd) of all tokens so far, the T of this pass included.
        values: As ``keys``.
        new_keys: (R, K, T, hd), the last of ``keys``, to be written.
        new_values: The last of ``values``.
    """

    keys: Tensor
    values: Tensor
    new_keys: Tensor
    new_values: Tensor

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values (R, K, T, hd); returns views of those of all tokens so far."""
        self.new_keys.copy_(key)
        self.new_values.copy_(value)
        return self.keys, self.values


class Memory:
    """Keys and values of all layers, taken once.

    Args:
        depth: Layers.
        shape: (R, K, S, hd) of keys, and of values.
        like: Has their type and device.
        apart: Each in memory of its own, as a compiled graph that writes them needs; else all in one, of which the
            views of all layers are made at once: a view costs as much as a small sum.

    Attributes:
        tensors: Keys and values of the layers by turns, each (R, K, S, hd).
    """

    def __init__(self, depth: int, shape: tuple[int, int, int, int], *, like: Tensor, apart: bool) -> None:
        self._all = None if apart else like.new_empty(2 * depth, *shape)
        self.tensors = [like.new_empty(shape) for _ in range(2 * depth)] if self._all is None else [*self._all.unbind()]

    def layers(self, start: int, stop: int) -> list[LayerMemory]:
        """Those of a pass that feeds tokens ``start`` to ``stop - 1``."""
        if self._all is None:
            seen: Sequence[Tensor] = [each[:, :, :stop] for each in self.tensors]
            fresh: Sequence[Tensor] = [each[:, :, start:stop] for each in self.tensors]
        else:
            seen = self._all[:, :, :, :stop].unbind()
            fresh = self._all[:, :, :, start:stop].unbind()
        return [LayerMemory(*views) for views in zip(seen[::2], seen[1::2], fresh[::2], fresh[1::2], strict=True)]

    def keep_rows(self, count: int) -> None:
        """Forget all rows after the first ``count``."""
        self._all = None if self._all is None else self._all[:, :count]
        self.tensors = [each[:count] for each in self.tensors]


class CachedDecoder:
    """A transformer with the memory of one batch: `prefill` once, then `step` for each code.

    Logits equal those of `LaytonGenTransformer.forward` up to rounding. On a CPU the decoder holds a packed copy of the
    weights (`generation.model.packing`); to make it once for many batches, pass ``packed(model)``. Steps of a model
    that was given to `generation.model.compiled.compile_decoding` run as its graph.

    Args:
        model: In eval mode.
        condition: Text features (R, L, dim) or labels (R,).
        mask: (R, L), true for real caption tokens, which stand last; None when all are real.
        num_codes: How many codes will be decoded at most; N when None.
        layout: (R, M, F), where objects stand; None when nothing is told.

    Attributes:
        memory: Keys and values.
        length: Tokens in it, caption included.

    Raises:
        ValueError: If the model is in training mode, the mask does not fit, is not left-padded or leaves a caption
            empty, ``num_codes`` is not in 1..N, or a layout does not fit or is none of the model's.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: LaytonGenTransformer,
        condition: Tensor,
        mask: Tensor | None = None,
        *,
        num_codes: int | None = None,
        layout: Tensor | None = None,
    ) -> None:
        count = model.num_tokens if num_codes is None else num_codes
        if model.training:
            raise ValueError("decoding needs the model in eval mode, it is in training mode")
        if not 1 <= count <= model.num_tokens:
            raise ValueError(f"num_codes must be in 1..{model.num_tokens}, got {count}")
        self.model = model
        self.mask = _checked_mask(mask, condition)
        self._prefix: Tensor = model.prefix(condition)
        self._control = model.control(layout, len(self._prefix))
        self._vocabulary = packed(model.vocabulary)
        self._blocks = [packed(block) for block in model.blocks]
        self._norm = packed_child(model.norm)
        self._head = self._vocabulary.frozen_head()
        rows, length, width = self._prefix.shape
        self.prefix_length, self.capacity = length, length + count - 1
        self.rotation = model.rotations(length, device=condition.device)
        compiled = model.compiled_step
        self._compiled = compiled if compiled is not None and self.capacity < compiled.capacity else None
        room = self.capacity if self._compiled is None else self._compiled.capacity
        shape = (rows, model.num_heads, room, width // model.num_heads)
        self.memory = Memory(len(model.blocks), shape, like=self._prefix, apart=self._compiled is not None)
        self.length = 0
        self._bias = self._last_tokens_bias(rows, room + 1)
        if self._compiled is not None and self._control is None:
            self._control = self._prefix.new_zeros(rows, model.num_tokens, width)

    def _last_tokens_bias(self, rows: int, keys: int) -> Tensor | None:
        """What the last token may see, of which each step takes the first columns; None for all there is."""
        if self.mask is not None:
            like = self._prefix
            return attention_bias(self.mask, queries=1, keys=keys, device=like.device, dtype=like.dtype)
        return None if self._compiled is None else self._prefix.new_zeros(rows, 1, 1, keys)

    @torch.inference_mode()
    def prefill(self, codes: Tensor | None = None) -> Tensor:
        """Feed the caption and codes (R, n) that are known already, in one pass.

        Returns:
            Logits of the next code (R, V).

        Raises:
            ValueError: If something was fed before, or there is no room.
        """
        if self.length:
            raise ValueError(f"prefill comes first, the cache holds {self.length} tokens")
        x = self._prefix
        if codes is not None and codes.shape[1]:
            x = torch.cat([x, self._vocabulary.embed(codes).to(x.dtype)], dim=1)
        if self._control is not None:
            first = self.prefix_length - 1
            x = torch.cat([x[:, :first], x[:, first:] + self._control[:, : x.shape[1] - first]], dim=1)
        if x.shape[1] > self.capacity:
            raise ValueError(f"{x.shape[1]} tokens do not fit into a cache of {self.capacity}")
        bias = attention_bias(self.mask, queries=x.shape[1], keys=x.shape[1], device=x.device, dtype=x.dtype)
        return self._feed(x, self.rotation.at(0, x.shape[1]), bias)

    @torch.inference_mode()
    def step(self, codes: Tensor) -> Tensor:
        """Feed one code for each row.

        Args:
            codes: (R,) int64.

        Returns:
            Logits of the next code (R, V).

        Raises:
            ValueError: If the cache is full or empty.
        """
        place = self.length
        if not 0 < place < self.capacity:
            raise ValueError(f"the cache holds {place} of {self.capacity} tokens: nothing can be fed")
        rotation, number = self.rotation.at(place, place + 1), place - self.prefix_length + 1
        control = None if self._control is None else self._control[:, number, None]
        if self._compiled is not None and self._bias is not None and control is not None:
            self.length += 1
            return self._compiled(codes, rotation, self._bias, control, self.memory.tensors, place)
        x = self._vocabulary.embed(codes[:, None]).to(self._prefix.dtype)
        x = x if control is None else x + control
        return self._feed(x, rotation, None if self._bias is None else self._bias[..., : place + 1])

    def keep_rows(self, count: int) -> None:
        """Forget all rows after the first ``count``, as when guidance ends."""
        self.memory.keep_rows(count)
        self._bias = None if self._bias is None else self._bias[:count]
        self._control = None if self._control is None else self._control[:count]

    def _feed(self, x: Tensor, rotation: Rotation, bias: Tensor | None) -> Tensor:
        for block, memory in zip(self._blocks, self._extend(x.shape[1]), strict=True):
            x = block(x, rotation, bias, memory)
        return self._head(self._norm(x[:, -1])).float()  # guidance magnifies what a small type rounds away

    def _extend(self, tokens: int) -> list[LayerMemory]:
        """Room for so many more tokens in every layer."""
        start, self.length = self.length, self.length + tokens
        return self.memory.layers(start, self.length)


def _checked_mask(mask: Tensor | None, condition: Tensor) -> Tensor | None:
    """The mask as bool, or None if every token is real.

    Raises:
        ValueError: If it does not fit, is not left-padded, or a caption is empty.
    """
    if mask is None:
        return None
    if mask.shape != condition.shape[:2]:
        raise ValueError(f"mask {tuple(mask.shape)} does not fit captions {tuple(condition.shape)}")
    real = mask.to(torch.bool)
    if real.numel() and not bool(real[:, -1].all()):
        raise ValueError("captions are padded on the left and hold a token at least: the last must be real")
    if bool((real[:, :-1] & ~real[:, 1:]).any()):
        raise ValueError("captions are padded on the left: padding found after a real token")
    return None if bool(real.all()) else real
