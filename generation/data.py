"""Token shards as a source of training samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from generation.token_shards import TokenHeader, TokenShard, differences, read_shard, shard_files
from layton.data.randomness import mix
from layton.data.sources import SampleSource
from layton.data.types import Split, check_split, split_of_key

_SCENES = "scenes/"


class TokenShards(SampleSource):
    """A token dataset that `layton tokenize` wrote, in memory (2 bytes for a token).

    A sample holds ``codes`` (N,) int64, ``caption`` and ``key``; with cached text features also ``text`` (L, D)
    float16, padded, and ``text_mask`` (L,) bool.

    Images are never mirrored: the tokens were made once, and mirroring would make captions such as "left of" untrue.

    Args:
        folder: What `layton tokenize` wrote.
        split: Keep only this split: of scenes by their seed, of others by their key; None for all.
        length: Keep only the first so many; all by default.
        chinese: For scenes, share of captions said anew in Chinese, in [0, 1]; chosen by the sample's seed.
        reworded: For scenes, share of captions said anew in another true way, in [0, 1]; chosen likewise.
        use_text: Whether cached text features are given out, where there are any.

    Raises:
        ValueError: If the folder is no finished token dataset, is damaged, or holds nothing of the split.
    """

    def __init__(
        self,
        folder: str,
        *,
        split: Split | None = None,
        length: int | None = None,
        chinese: float = 0.0,
        reworded: float = 0.0,
        use_text: bool = True,
    ) -> None:
        if not (0.0 <= chinese <= 1.0 and 0.0 <= reworded <= 1.0) or (length is not None and length < 1):
            raise ValueError(f"need shares in [0, 1] and length >= 1, got {chinese}, {reworded}, {length}")
        self.folder, self.split = Path(folder), check_split(split)
        self.chinese, self.reworded = chinese, reworded
        headers, shards = zip(*(read_shard(path) for path in shard_files(self.folder)), strict=True)
        self.header: TokenHeader = headers[0]
        if any(header != self.header for header in headers):
            raise ValueError(f"{folder}: shards were made by different things")
        self._narrow = torch.uint16 if self.header.vocab_size <= 2**16 else torch.int32
        self._texts = _TextTable(shards) if use_text and self.header.text_encoder else None
        if self._texts is not None and (chinese or reworded):
            raise ValueError("captions said anew have no cached features: pass use_text=False, or no shares")
        keys = [key for shard in shards for key in shard.keys]
        rows = [row for row, key in enumerate(keys) if self.split is None or split_of(key) == self.split][:length]
        if not rows:
            raise ValueError(f"split {split!r} of {folder} holds no samples")
        captions = [caption for shard in shards for caption in shard.captions]
        self._rows = rows
        self._keys, self._captions = [keys[row] for row in rows], [captions[row] for row in rows]
        self._codes = torch.cat([shard.codes for shard in shards])[rows].to(self._narrow)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._keys)

    @property
    def keys(self) -> list[str]:
        """Keys of all samples, in order."""
        return self._keys

    def codes(self) -> Tensor:
        """Codes (n, N) int64 of all samples, in order."""
        return self._codes.long()

    def sample(self, index: int, *, seed: int) -> dict[str, Any]:
        """One sample; the seed decides the wording of a scene's caption. See `SampleSource.sample`."""
        key = self._keys[index]
        sample: dict[str, Any] = {
            "codes": self._codes[index].long(),
            "caption": self._caption(index, key, seed),
            "key": key,
        }
        if self._texts is not None:
            text, mask = self._texts.padded(self._rows[index], self.header.text_length, self.header.text_padding)
            sample |= {"text": text, "text_mask": mask}
        return sample

    def require_tokenizer(self, fingerprint: str) -> None:
        """Refuse tokens of another tokenizer.

        Args:
            fingerprint: Of the tokenizer's codebook.

        Raises:
            ValueError: With both fingerprints.
        """
        differs = differences({"fingerprint": self.header.fingerprint}, {"fingerprint": fingerprint})
        if differs:
            raise ValueError(f"{self.folder} holds tokens of another tokenizer ({differs})")

    def _caption(self, index: int, key: str, seed: int) -> str:
        if not (self.chinese or self.reworded) or not key.startswith(_SCENES):
            return self._captions[index]
        from layton.scenes import caption, sample_scene

        scene_seed = int(key.removeprefix(_SCENES))
        language, wording, variant = (mix(seed, scene_seed, choice) for choice in range(3))
        return caption(
            sample_scene(scene_seed),
            language="zh" if language < self.chinese * 2**63 else "en",
            variant=variant if wording < self.reworded * 2**63 else None,
        )


def split_of(key: str) -> Split:
    """Split of a sample: of a scene by its seed, of any other by its key."""
    name = key.removeprefix(_SCENES)
    if name != key and name.isascii() and name.isdigit():
        from layton.scenes.splits import split_of_seed

        return split_of_seed(int(name))
    return split_of_key(key)


class _TextTable:
    """Cached features of all captions, without padding."""

    def __init__(self, shards: tuple[TokenShard, ...]) -> None:
        self._text = torch.cat([shard.text for shard in shards if shard.text is not None])
        lengths = [torch.diff(s.text_ends, prepend=s.text_ends.new_zeros(1)) for s in shards if s.text_ends is not None]
        self._ends = torch.cat(lengths).cumsum(0)

    def padded(self, row: int, length: int, side: str) -> tuple[Tensor, Tensor]:
        """Features (L, D) and mask (L,) of one caption."""
        start = int(self._ends[row - 1]) if row else 0
        found = self._text[start : int(self._ends[row])]
        place = slice(length - len(found), None) if side == "left" else slice(0, len(found))
        text, mask = found.new_zeros(length, found.shape[1]), torch.zeros(length, dtype=torch.bool)
        text[place], mask[place] = found, True
        return text, mask
