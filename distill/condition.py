"""What a denoiser is conditioned on: one typed bundle for every kind of network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Condition:
    """Optional conditioning tensors; a network reads those it knows and refuses to do without those it needs.

    ``guidance`` follows the convention of diffusers' ``guidance_scale`` (1 is the plain conditional model) everywhere;
    networks that were trained with LCM's weight (one less) are given it by their wrapper.
    """

    embeds: Tensor | None = None  # (B, L, D) text embeddings
    mask: Tensor | None = None  # (B, L) 1 or True where a text position is real
    pooled: Tensor | None = None  # (B, P) pooled text embedding (SDXL, SD3, FLUX)
    time_ids: Tensor | None = None  # (B, 6) SDXL sizes: original, crop corner, target, each (height, width)
    spatial: Tensor | None = None  # (B, d, h, w) map for a conditioning branch (code embeddings)
    guidance: Tensor | None = None  # (B,) guidance scale fed to the network itself (FLUX, LCM students)

    @property
    def is_empty(self) -> bool:
        """Whether no field is set."""
        return not self._items()

    @property
    def batch_size(self) -> int | None:
        """B, or ``None`` for the empty condition.

        Raises:
            ValueError: The fields disagree.
        """
        sizes = {name: value.shape[0] for name, value in self._items().items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"condition fields differ in batch size: {sizes}")
        return next(iter(sizes.values()), None)

    def map(self, function: Callable[[Tensor], Tensor]) -> Condition:
        """Apply a function to every tensor that is set."""
        return replace(self, **{name: function(value) for name, value in self._items().items()})

    def to(self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Condition:
        """Move to a device; ``dtype`` applies to floating-point fields only."""
        return self.map(lambda value: value.to(device=device, dtype=dtype if value.is_floating_point() else None))

    def repeat(self, times: int) -> Condition:
        """Each sample ``times`` times in a row (a a b b), as diffusers orders several images per prompt."""
        return self.map(lambda value: value.repeat_interleave(times, dim=0))

    def expand(self, batch_size: int) -> Condition:
        """One sample seen ``batch_size`` times; a condition of that batch size already is returned as it is.

        Raises:
            ValueError: The batch size is neither 1 nor ``batch_size``.
        """
        size = self.batch_size
        if size in (None, batch_size):
            return self
        if size != 1:
            raise ValueError(f"cannot expand a condition of batch size {size} to {batch_size}")
        return self.map(lambda value: value.expand(batch_size, *value.shape[1:]))

    def filled_from(self, other: Condition) -> Condition:
        """This condition with unset fields taken from ``other``; one of them may have batch size 1."""
        own, theirs = self._items(), other._items()
        size = max((value.shape[0] for value in (*own.values(), *theirs.values())), default=1)
        left, right = self.expand(size)._items(), other.expand(size)._items()
        return Condition(**(right | left))

    def __getitem__(self, index: slice | Tensor) -> Condition:
        """A part of the batch; a plain integer is refused, since it would drop the batch dimension."""
        if not isinstance(index, slice | Tensor):
            raise TypeError(f"index a condition with a slice or a tensor, got {type(index).__name__}")
        return self.map(lambda value: value[index])

    @staticmethod
    def cat(conditions: Sequence[Condition]) -> Condition:
        """Join along the batch.

        Raises:
            ValueError: Nothing to join, or not all set the same fields.
        """
        names = [set(condition._items()) for condition in conditions]
        if not names or any(found != names[0] for found in names):
            raise ValueError(f"conditions must set the same fields, got {[sorted(found) for found in names]}")
        return Condition(**{name: torch.cat([c._items()[name] for c in conditions]) for name in sorted(names[0])})

    def _items(self) -> dict[str, Tensor]:
        pairs = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in pairs if value is not None}
