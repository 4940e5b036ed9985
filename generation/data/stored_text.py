"""What stays on disk of a token dataset: rows are read from their shard when they are wanted."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_OPEN_FILES = 64  # mapped at a time; each takes address space and a header of a few hundred bytes


class MappedShards:
    """Rows of the tensors in a token dataset's shards, whose memory does not grow with it.

    Shards are mapped into memory, so that what was read is the system's to drop. Every process maps them anew: a
    forked or spawned worker of a loader takes over no handle.

    Args:
        paths: The shards, in order; checked already (`generation.data.token_shards.read_shard`).
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)
        self._files: OrderedDict[int, Any] = OrderedDict()
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs: everything but the open files."""
        return {**self.__dict__, "_files": OrderedDict()}

    def rows(self, shard: int, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop - 1`` of a tensor of a shard.

        Raises:
            ValueError: If the shard is not there any more or was damaged since it was checked.
        """
        try:
            found: Tensor = self._file(shard).get_slice(name)[start:stop]
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self._paths[shard]} cannot be read any more: {error}") from error
        return found

    def _file(self, shard: int) -> Any:
        if self._process != os.getpid():
            self._files, self._process = OrderedDict(), os.getpid()
        if shard not in self._files:
            self._files[shard] = safe_open(str(self._paths[shard]), framework="pt")
            if len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)
        self._files.move_to_end(shard)
        return self._files[shard]


class StoredText:
    """Cached features of all captions of a token dataset.

    Args:
        shards: Where they lie.
        length: L, to which features are padded.
        side: Of the padding, "left" or "right".
    """

    def __init__(self, shards: MappedShards, *, length: int, side: str) -> None:
        self._shards, self._length, self._side = shards, length, side

    def padded(self, shard: int, row: int) -> tuple[Tensor, Tensor]:
        """Features (L, D) float16, zero at padding, and mask (L,) bool of one caption.

        Args:
            shard: Index of the shard.
            row: Index of the caption in it.

        Raises:
            ValueError: See `MappedShards.rows`.
        """
        ends = [0, *self._shards.rows(shard, "text_ends", max(row - 1, 0), row + 1).tolist()][-2:]
        found = self._shards.rows(shard, "text", *ends)
        length = self._length
        place = slice(length - len(found), None) if self._side == "left" else slice(0, len(found))
        text, mask = found.new_zeros(length, found.shape[1]), torch.zeros(length, dtype=torch.bool)
        text[place], mask[place] = found, True
        return text, mask
