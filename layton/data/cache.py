"""Tensors computed once (latents, codes, text features) and read many times, with a fingerprint of what made them.

On disk a cache is a folder: parts of a few thousand samples as safetensors, and `cache.json`, written last, which lists
them. A folder without it is no cache: an interrupted build leaves nothing that could be taken for a finished one, and
goes on after its last whole part.
"""

from __future__ import annotations

import bisect
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from layton.data.bad import BadImages
from layton.data.sources import SampleSource
from layton.data.texts import PackedTexts
from layton.folder import write_atomically, write_text
from layton.lock import lock_folder

Fingerprint = Mapping[str, str | int | float | bool]
ComputeFn = Callable[[dict[str, Any]], Mapping[str, Tensor]]

_MANIFEST = "cache.json"
_BEGUN = "begun.json"  # what an unfinished cache's parts are made by
_FORMAT = 1


class CacheMismatchError(ValueError):
    """A cache was made by something else than what the caller has; the message names every field that differs."""


class CachedTensors(SampleSource):
    """A finished cache, read as a source: each sample has its tensors, its "key" and its "caption".

    Args:
        folder: What `build` wrote.
        fingerprint: What must have made it; None accepts any.
        in_memory: Read everything now; otherwise samples are read from disk one by one.

    Raises:
        CacheMismatchError: If the fingerprint is another one.
        ValueError: If the folder is no finished cache, or damaged.
    """

    def __init__(self, folder: str, *, fingerprint: Fingerprint | None = None, in_memory: bool = True) -> None:
        self.folder = Path(folder)
        manifest = _read_manifest(self.folder)
        self.fingerprint: dict[str, str | int | float | bool] = manifest["fingerprint"]
        if fingerprint is not None:
            require_same(self.folder, self.fingerprint, fingerprint)
        self._names: list[str] = manifest["tensors"]
        self._paths = [self.folder / part["file"] for part in manifest["parts"]]
        self._ends = list(accumulate(int(part["samples"]) for part in manifest["parts"]))
        texts = [_read_texts(path) for path in self._paths]
        counts = [len(part["key"]) for part in texts]
        if list(accumulate(counts)) != self._ends:
            raise ValueError(f"{folder}: damaged cache: parts hold {counts} samples, {self._ends} were expected in sum")
        self._texts = {name: PackedTexts(chain.from_iterable(part[name] for part in texts)) for name in texts[0]}
        self._memory: dict[str, Tensor] | None = None
        if in_memory:
            self._memory = {name: torch.cat([self._read(path, name) for path in self._paths]) for name in self._names}

    @classmethod
    def build(
        cls,
        batches: Iterable[dict[str, Any]],
        compute: ComputeFn,
        folder: str,
        *,
        fingerprint: Fingerprint,
        part_size: int = 2048,
        in_memory: bool = True,
        parts: Sequence[Path] = (),
        passed_over: Iterable[str] = (),
    ) -> CachedTensors:
        """Compute the tensors of all batches and write them; memory is bounded by one part.

        Args:
            batches: Batches with "key" and, if there are any, "caption" (an `OrderedLoader` for instance).
            compute: Batch to tensors (B, ...); it chooses their type, fp16 halves the size.
            folder: Where to write; must not hold a cache.
            fingerprint: What makes these tensors: weights' digest, size, crop, source, seed and so on.
            part_size: Samples in a file.
            in_memory: As for the constructor.
            parts: Files of the folder, from the first on, that hold the samples before these batches.
            passed_over: Broken images that were met in making these.

        Returns:
            The cache, opened.

        Raises:
            ValueError: If there is a cache already, no batch, or a tensor of another length or not finite.
        """
        if part_size < 1:
            raise ValueError(f"part_size must be >= 1, got {part_size}")
        target = Path(folder)
        if (target / _MANIFEST).exists():
            raise ValueError(f"{folder}: holds a finished cache already")
        target.mkdir(parents=True, exist_ok=True)
        for orphan in target.glob(".*.part"):  # of a process that was killed while it wrote
            orphan.unlink(missing_ok=True)
        writer = _PartWriter(target, part_size, parts)
        broken = BadImages(tell=lambda reason, _: print(f"layton: passed over: {reason}", file=sys.stderr))
        broken.restore(passed_over)
        _begin(target, fingerprint, broken.reasons)
        sys.stderr.write(f"layton: computing {target}, once{f', from part {len(parts)} on' if parts else ''}\n")
        for batch in batches:
            known = len(writer.parts)
            broken.record_all(batch.get("bad", ()))
            with torch.no_grad():
                writer.add(batch, compute(batch))
            if len(writer.parts) > known:
                _begin(target, fingerprint, broken.reasons)
                sys.stderr.write(f"layton: {target}: {part_size * len(writer.parts):,} samples are there\n")
        writer.flush()
        if broken.count:
            sys.stderr.write(f"layton: {target}: {broken.count:,} broken images, in whose places others stand\n")
        if not writer.parts:
            raise ValueError(f"{folder}: there was no batch to cache")
        manifest = {
            "format": _FORMAT,
            "fingerprint": dict(fingerprint),
            "tensors": writer.names,
            "parts": writer.parts,
            "broken": broken.reasons,
        }
        write_text(target / _MANIFEST, json.dumps(manifest, indent=1, sort_keys=True))
        (target / _BEGUN).unlink(missing_ok=True)
        return cls(folder, fingerprint=fingerprint, in_memory=in_memory)

    @classmethod
    def open_or_build(
        cls,
        batches: Callable[[int], Iterable[dict[str, Any]]],
        compute: ComputeFn,
        folder: str,
        *,
        fingerprint: Fingerprint,
        part_size: int = 2048,
        in_memory: bool = True,
    ) -> CachedTensors:
        """Open the cache of a folder, or build it when there is none; where a build was interrupted, go on with it.

        Of several processes one builds, and the others wait for it.

        Args:
            batches: Gives the batches from a sample's number on, if they are needed.
            compute: As for `build`.
            folder: As for `build`.
            fingerprint: As for `build`; a finished cache with another one is refused, never overwritten.
            part_size: As for `build`.
            in_memory: As for the constructor.

        Raises:
            CacheMismatchError: If the folder holds a cache made by something else.
        """
        target = Path(folder)
        if not (target / _MANIFEST).exists():
            with lock_folder(target, wait=True):
                if not (target / _MANIFEST).exists():
                    parts, passed_over = _left_by(target, fingerprint)
                    rest = batches(sum(len(_read_texts(part)["key"]) for part in parts))
                    cls.build(
                        rest,
                        compute,
                        folder,
                        fingerprint=fingerprint,
                        part_size=part_size,
                        in_memory=False,
                        parts=parts,
                        passed_over=passed_over,
                    )
        return cls(folder, fingerprint=fingerprint, in_memory=in_memory)

    def __len__(self) -> int:
        """Number of samples."""
        return self._ends[-1]

    @property
    def keys(self) -> Sequence[str]:
        """Keys of all samples, in order."""
        return self._texts["key"]

    def sample(self, index: int, *, seed: int = 0) -> dict[str, Any]:
        """Tensors and texts of one sample; the seed has no influence. See `SampleSource.sample`."""
        sample: dict[str, Any] = {name: texts[index] for name, texts in self._texts.items()}
        if self._memory is not None:
            return sample | {name: tensor[index] for name, tensor in self._memory.items()}
        part = bisect.bisect_right(self._ends, index)
        row = index - (self._ends[part - 1] if part else 0)
        with safe_open(self._paths[part], framework="pt") as file:
            return sample | {name: file.get_slice(name)[row : row + 1][0] for name in self._names}

    def tensor(self, name: str) -> Tensor:
        """One tensor of all samples (n, ...).

        Args:
            name: Its name.

        Raises:
            ValueError: If there is none of that name.
        """
        if name not in self._names:
            raise ValueError(f"{self.folder}: no tensor {name!r}, only {', '.join(self._names)}")
        if self._memory is not None:
            return self._memory[name]
        return torch.cat([self._read(path, name) for path in self._paths])

    def _read(self, path: Path, name: str) -> Tensor:
        try:
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: damaged cache ({error})") from error
        return tensor


class _PartWriter:
    """Collects batches and writes a part whenever enough samples are there."""

    def __init__(self, folder: Path, part_size: int, parts: Sequence[Path]) -> None:
        self.parts = [{"file": part.name, "samples": len(_read_texts(part)["key"])} for part in parts]
        self.names: list[str] = _names_in(parts[0]) if parts else []
        self._folder = folder
        self._part_size = part_size
        self._tensors: dict[str, list[Tensor]] = {}
        self._texts: dict[str, list[str]] = {"key": [], "caption": []}

    def add(self, batch: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        keys: list[str] = batch["key"]
        for name, tensor in tensors.items():
            if tensor.ndim < 1 or tensor.shape[0] != len(keys):
                raise ValueError(f"{name!r} has shape {tuple(tensor.shape)} for a batch of {len(keys)}")
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{name!r} is not finite in the batch that begins with {keys[0]!r}")
        if not tensors or set(tensors) & set(self._texts) or (self.names and sorted(tensors) != self.names):
            raise ValueError(f"tensors {sorted(tensors)} clash with {self.names or sorted(self._texts)}")
        self.names = sorted(tensors)
        for name, tensor in tensors.items():
            self._tensors.setdefault(name, []).append(tensor.detach().to("cpu"))
        self._texts["key"] += keys
        self._texts["caption"] += batch.get("caption", [""] * len(keys))
        if len(self._texts["key"]) >= self._part_size:
            self.flush()

    def flush(self) -> None:
        count = len(self._texts["key"])
        if count == 0:
            return
        name = _part_name(len(self.parts))
        tensors = {key: torch.cat(values).contiguous() for key, values in self._tensors.items()}
        metadata = {"texts": json.dumps(self._texts)}
        write_atomically(self._folder / name, lambda part: save_file(tensors, part, metadata=metadata))
        self.parts.append({"file": name, "samples": count})
        self._tensors, self._texts = {}, {"key": [], "caption": []}


def _begin(folder: Path, fingerprint: Fingerprint, broken: list[str]) -> None:
    """Write down by whom a folder's parts are made, and what was passed over so far."""
    begun = {"fingerprint": dict(fingerprint), "broken": broken}
    write_text(folder / _BEGUN, json.dumps(begun, indent=1, sort_keys=True))


def _left_by(folder: Path, fingerprint: Fingerprint) -> tuple[list[Path], list[str]]:
    """The whole parts that an interrupted build by the same maker left, and the broken images it met.

    Parts of another maker are deleted: nobody may take them for this one's later.
    """
    begun = folder / _BEGUN
    if begun.is_file():
        left = json.loads(begun.read_text(encoding="utf-8"))
        if left.get("fingerprint") == dict(fingerprint):
            found = sorted(folder.glob("part-*.safetensors"))
            whole = [path for number, path in enumerate(found) if path.name == _part_name(number)]
            return whole, list(left["broken"])
        begun.unlink()
    for path in folder.glob("part-*.safetensors"):
        path.unlink()
    return [], []


def _part_name(number: int) -> str:
    return f"part-{number:05d}.safetensors"


def _names_in(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return sorted(file.keys())


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{folder}: holds no finished cache") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: unreadable {_MANIFEST} ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise ValueError(f"{folder}: {_MANIFEST} is not of format {_FORMAT}")
    names = [part["file"] for part in manifest["parts"]]
    if any(Path(name).name != name for name in names):
        raise ValueError(f"{folder}: {_MANIFEST} names files outside the folder: {names}")
    return manifest


def differing(stored: Fingerprint, wanted: Fingerprint) -> list[str]:
    """Names of the fields in which two fingerprints differ."""
    return [name for name in sorted({*stored, *wanted}) if stored.get(name) != wanted.get(name)]


def differences(stored: Fingerprint, wanted: Fingerprint) -> str:
    """Fields in which two fingerprints differ, in words; empty if they are equal."""
    names = differing(stored, wanted)
    return "; ".join(f"{name}: stored {stored.get(name)!r}, wanted {wanted.get(name)!r}" for name in names)


def require_same(folder: Path, stored: Fingerprint, wanted: Fingerprint) -> None:
    """Stop unless two fingerprints are equal.

    Raises:
        CacheMismatchError: They are not; every field that differs is named.
    """
    if changes := differences(stored, wanted):
        raise CacheMismatchError(f"{folder}: what lies there was made by something else ({changes})")


def _read_texts(path: Path) -> dict[str, PackedTexts]:
    """Keys and captions of a part."""
    try:
        with safe_open(path, framework="pt") as file:
            texts = json.loads((file.metadata() or {})["texts"])
        return {name: PackedTexts(texts[name]) for name in ("key", "caption")}
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise ValueError(f"{path}: damaged cache ({error})") from error
