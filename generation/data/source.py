"""Token shards as a source of training samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from generation.data.stored_text import MappedShards, StoredText
from generation.data.token_shards import DRAWN_WRONG, TokenHeader, read_shard, require_whole, shard_files
from generation.model.layout import LayoutShape, scenes_layout
from layton.data.cache import differences
from layton.data.prompts import SceneCaptions
from layton.data.sources import SampleSource, say, say_contrary, walk
from layton.data.texts import PackedTexts
from layton.data.types import Split, check_split, split_of_key
from layton.scenes import (
    SHOWN_SIZES,
    Scene,
    Texture,
    begun_cells,
    check_textures,
    objects_ahead,
    objects_placed,
    objects_shown,
    sample_scene,
    seed_of_key,
    split_of_seed,
    texture_of,
)
from layton.scenes.contrary import CHANGES, Change


class TokenShards(SampleSource):
    """A token dataset that `layton tokenize` wrote: codes in memory (2 bytes for a token), text features on disk.

    A sample holds ``codes`` (N,) int64, ``caption`` and ``key``, and ``contrary``, ``ahead`` and ``layout`` if those
    were asked for; with cached text features also ``text`` (L, D) float16, padded, and ``text_mask`` (L,) bool.

    Images are never mirrored: the tokens were made once, and mirroring would make captions such as "left of" untrue.

    Args:
        folder: What `layton tokenize` wrote.
        split: Keep only this split: of scenes by their seed, of others by their key; None for all.
        length: Keep only the first so many; all by default.
        chinese: For scenes, share of captions said anew in Chinese, in [0, 1]; chosen by the sample's seed.
        reworded: For scenes, share of captions said anew in another true way, in [0, 1]; chosen likewise.
        related: For scenes, share of captions of two objects that say how they stand, where that is clear.
        textures: Keep only scenes with one of these backgrounds, and no other images; all by default.
        unbegun: For scenes, weight of codes that come before any object is next to them (`layton.scenes.begun_cells`),
            in (0, 1]; below 1 samples also hold ``weights`` (N,), see `generation.tasks.laytongen.LaytonGenTask`.
        contrary: For scenes, what is wrong in a false caption that goes with the true one: some of count, colour,
            relation, shape, kind (`layton.scenes.contrary`). Samples then hold ``contrary``, empty where none applies.
        ahead: For scenes, whether samples also hold ``ahead`` (N, 3), what is still to be drawn at each code
            (`layton.scenes.objects_ahead`).
        placed: For scenes, steps of the side in which samples are told where objects stand, ``layout`` (5, 5), see
            `layton.scenes.objects_placed` and `generation.model.layout`; 0 for none.
        shown: For `generation.tasks.judge`, side of a grid of which samples hold ``shown`` (shown**2, 3), what is seen
            in each cell (`layton.scenes.objects_shown`), -1 for what is no scene, and ``contrary``; 0 for none.
        untrue: Whether the captions are false, as those of drawn images that are wrong (`generation.tasks.rollouts`):
            samples then hold them as ``contrary``, and an empty ``caption``.
        use_text: Whether cached text features are given out, where there are any.
        in_memory: Keep the codes in memory, in every process; otherwise they are read from disk one by one, and memory
            holds keys, captions and some 24 bytes a sample.
        verify: Compare the shards' digests with the manifest's first, which reads all of them, cached text included;
            once, as long as their sizes and times of change stay the same, and by one of several processes.

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
        related: float = 0.0,
        textures: Sequence[Texture] | None = None,
        unbegun: float = 1.0,
        contrary: Sequence[Change] = (),
        ahead: bool = False,
        placed: int = 0,
        shown: int = 0,
        untrue: bool = False,
        use_text: bool = True,
        in_memory: bool = True,
        verify: bool = True,
    ) -> None:
        shares = {"chinese": chinese, "reworded": reworded, "related": related}
        if not all(0.0 <= share <= 1.0 for share in shares.values()) or (length is not None and length < 1):
            raise ValueError(f"need shares in [0, 1] and length >= 1, got {shares}, {length}")
        if not 0.0 < unbegun <= 1.0:
            raise ValueError(f"unbegun must be in (0, 1], got {unbegun}")
        if isinstance(contrary, str) or not set(contrary) <= set(CHANGES):
            raise ValueError(f"contrary must be some of {', '.join(CHANGES)}, got {contrary!r}")
        if min(shown, placed) < 0 or (untrue and (contrary or any(shares.values()))):
            raise ValueError(
                "need shown >= 0 and placed >= 0, and of untrue captions no others, "
                f"got {(shown, placed)}, {contrary}, {shares}"
            )
        if textures is not None:
            check_textures(textures)
        self.folder, self.split, self._unbegun = Path(folder), check_split(split), unbegun
        self._shares, self._contrary = shares if any(shares.values()) else None, tuple(contrary)
        paths = shard_files(self.folder)
        if verify:
            require_whole(self.folder)
        kept = _read_all(paths, partial(_is_wanted, split=self.split, textures=textures), length, with_codes=in_memory)
        if not kept.keys:
            raise ValueError(f"split {split!r} of {folder} holds no samples" + (f" on {textures}" if textures else ""))
        needs_scenes = bool(ahead or placed)
        other = next((key for key in kept.keys if seed_of_key(key) is None), None) if needs_scenes else None
        if other is not None:
            raise ValueError(f"only of scenes is known what is ahead and where, {folder} also holds {other!r}")
        if untrue and any(seed_of_key(key) is not None for key in kept.keys):
            raise ValueError(f"captions of scenes are true, {folder} holds some: untrue is of drawn images")
        if kept.header.policy == DRAWN_WRONG and not untrue:
            raise ValueError(f"{folder} holds images that do not show what their captions say: pass untrue=True")
        self._ahead, self._placed, self._shown, self._untrue = ahead, placed, shown, untrue
        self.header, self._keys, self._captions = kept.header, kept.keys, kept.captions
        self._codes = None if kept.codes is None else kept.codes.numpy()  # torch cannot pickle its uint16
        self._places, self._shards = kept.places, MappedShards(paths)
        self._texts: StoredText | None = None
        if use_text and self.header.text_encoder:
            if self._shares:
                raise ValueError("captions said anew have no cached features: pass use_text=False, or no shares")
            self._texts = StoredText(self._shards, length=self.header.text_length, side=self.header.text_padding)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._keys)

    @property
    def keys(self) -> Sequence[str]:
        """Keys of all samples, in order."""
        return self._keys

    def codes(self) -> Tensor:
        """Codes (n, N) int64 of all samples, in order."""
        if self._codes is None:
            return torch.stack([self._codes_of(index) for index in range(len(self))])
        return torch.from_numpy(self._codes.astype(np.int64))

    def _codes_of(self, index: int) -> Tensor:
        if self._codes is not None:
            return torch.from_numpy(self._codes[index].astype(np.int64))
        shard, row = self._places[index].tolist()
        return self._shards.rows(shard, "codes", row, row + 1)[0].long()

    def sample(self, index: int, *, seed: int) -> dict[str, Any]:
        """One sample; the seed decides the wording of a scene's caption. See `SampleSource.sample`."""
        key = self._keys[index]
        sample: dict[str, Any] = {
            "codes": self._codes_of(index),
            "caption": self._caption(index, key, seed),
            "key": key,
        }
        if self._contrary or self._shown:
            sample["contrary"] = self._false_caption(key, seed)
        if self._untrue:
            sample |= {"caption": "", "contrary": sample["caption"]}
        if self._unbegun < 1:
            sample["weights"] = self._weights(key)
        if self._ahead:
            sample["ahead"] = torch.from_numpy(objects_ahead(_scene(key), self._grid))
        if self._placed:
            sample["layout"] = torch.from_numpy(objects_placed(_scene(key), self._placed))
        if self._shown:
            sample["shown"] = self._seen(key)
        if self._texts is not None:
            shard, row = self._places[index].tolist()
            text, mask = self._texts.padded(shard, row)
            sample |= {"text": text, "text_mask": mask}
        return sample

    def require_tokenizer(self, fingerprint: str, *, encoder: str | None = None) -> None:
        """Refuse tokens of another tokenizer.

        Args:
            fingerprint: Of the tokenizer's codebook.
            encoder: `layton.modules.weights_digest` of its encoder: another one gives other codes of the same codebook.

        Raises:
            ValueError: With what differs.
        """
        wanted = {"fingerprint": fingerprint} | ({} if encoder is None else {"encoder": encoder})
        differs = differences({name: getattr(self.header, name) for name in wanted}, wanted)
        if differs:
            raise ValueError(f"{self.folder} holds tokens of another tokenizer ({differs})")

    @property
    def placed(self) -> int:
        """Steps of the side in which samples hold where objects stand; 0 if they do not."""
        return self._placed

    @property
    def _grid(self) -> int:
        return math.isqrt(self.header.num_tokens)

    def _caption(self, index: int, key: str, seed: int) -> str:
        if self._shares is None or seed_of_key(key) is None:
            return self._captions[index]
        return say(_scene(key), seed, **self._shares)

    def _false_caption(self, key: str, seed: int) -> str:
        if not self._contrary or seed_of_key(key) is None:
            return ""
        return say_contrary(_scene(key), seed, self._contrary, **(self._shares or {}))

    def _seen(self, key: str) -> Tensor:
        if seed_of_key(key) is None:
            return torch.full((self._shown**2, len(SHOWN_SIZES)), -1)
        return torch.from_numpy(objects_shown(_scene(key), self._shown))

    def _weights(self, key: str) -> Tensor:
        if seed_of_key(key) is None:  # nobody knows where a photograph's objects begin
            return torch.ones(self.header.num_tokens)
        begun = begun_cells(_scene(key), self._grid)
        return torch.from_numpy(np.where(begun, 1.0, self._unbegun).astype(np.float32).ravel())


def require_layouts(sources: Iterable[SampleSource], shape: LayoutShape | None) -> None:
    """Refuse layouts, of sources and what they are made of, of another kind than a model is told or tells.

    Raises:
        ValueError: With both kinds.
    """
    for source in walk(sources):
        steps = source.placed if isinstance(source, TokenShards | SceneCaptions) else 0
        if steps and shape != scenes_layout(steps=steps):
            raise ValueError(f"the data have layouts of Scenes in {steps} steps (placed), the model has {shape}")


def _scene(key: str) -> Scene:
    seed = seed_of_key(key)
    if seed is None:
        raise ValueError(f"only of scenes is known what they show, got the key {key!r}")
    return sample_scene(seed)


def _is_wanted(key: str, *, split: Split | None, textures: Sequence[Texture] | None) -> bool:
    if split is not None and split_of(key) != split:
        return False
    seed = seed_of_key(key)
    return textures is None or (seed is not None and texture_of(seed) in textures)


def split_of(key: str) -> Split:
    """Split of a sample: of a scene by its seed, of any other by its key."""
    seed = seed_of_key(key)
    return split_of_key(key) if seed is None else split_of_seed(seed)


@dataclass(frozen=True, slots=True, eq=False)
class _Kept:
    """The samples that are kept: header, keys, captions, codes (n, N) as stored, or None, and places (n, 2) int32.

    A place is the index of the shard and the row in it.
    """

    header: TokenHeader
    keys: PackedTexts
    captions: PackedTexts
    codes: Tensor | None
    places: Tensor


def _read_all(paths: Sequence[Path], wanted: Callable[[str], bool], length: int | None, *, with_codes: bool) -> _Kept:
    """The samples whose keys are wanted; one shard is held at a time.

    Raises:
        ValueError: If there is no shard, one is damaged, or they were made by different things.
    """
    keys: list[PackedTexts] = []
    captions: list[PackedTexts] = []
    codes: list[Tensor] = []
    places: list[Tensor] = []
    headers: list[TokenHeader] = []
    count = 0
    for number, path in enumerate(paths):
        if length is not None and count == length:
            break
        header, shard = read_shard(path, with_text=False)
        headers.append(header)
        if header != headers[0]:
            raise ValueError(f"{path.parent}: shards were made by different things")
        rows = [row for row, key in enumerate(shard.keys) if wanted(key)]
        rows = rows if length is None else rows[: length - count]
        count += len(rows)
        keys.append(PackedTexts(shard.keys[row] for row in rows))
        captions.append(PackedTexts(shard.captions[row] for row in rows))
        chosen = torch.tensor(rows, dtype=torch.int64)
        codes += [shard.codes[chosen]] if with_codes else []
        places.append(torch.stack([torch.full_like(chosen, number), chosen], dim=1).int())
    if not headers:
        raise ValueError("the token dataset has no shards")
    all_keys, all_captions = (PackedTexts(chain.from_iterable(parts)) for parts in (keys, captions))
    return _Kept(headers[0], all_keys, all_captions, torch.cat(codes) if with_codes else None, torch.cat(places))
