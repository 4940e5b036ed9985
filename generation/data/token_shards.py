"""Token shards: images as codes, with captions and keys, in safetensors files that name the tokenizer that made them.

A token dataset is a folder: ``plan.json`` (what is to be written, from what; written first),
``tokens-00000.safetensors`` and so on (each appears when it is whole), and ``manifest.json`` (counts, hashes, what was
passed over; written last).

Tensors of a shard: ``codes`` (n, N) uint16, or int32 for more than 65,536 codes; ``sizes`` (n, 2) int32, height and
width of the images before they became square; ``texts``, the UTF-8 bytes of a JSON
object with the lists ``key``, ``caption`` and ``skipped``; and, where text features were cached, ``text`` (rows, D)
float16, the features of all captions one after another without padding, and ``text_ends`` (n,) int64, where they end.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from layton.data.cache import differences
from layton.data.geometry import FitPolicy, Geometry
from layton.data.images import DEFAULT_LIMITS
from layton.data.texts import key_digests
from layton.folder import told_of_runs, write_atomically, write_text
from layton.lock import FolderInUseError, lock_folder
from layton.tokenizer import EncodedImages

FORMAT = "layton tokens 1"
DRAWN_RIGHT, DRAWN_WRONG = "drawn, right", "drawn, wrong"  # policies of images that a generator drew
PLAN_NAME, MANIFEST_NAME = "plan.json", "manifest.json"
WHOLE_NAME = ".whole.json"  # what shards looked like when they were found to be what was written
_SEAL = "sha256"  # in a manifest, of all else in it
_COUNTS = {"inputs", "samples", "skipped"}
_UINT16_CODES = 2**16
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, slots=True)
class TokenHeader:
    """What all tokens of a dataset have in common.

    Attributes:
        fingerprint: Of the tokenizer's codebook.
        vocab_size: V.
        num_tokens: N.
        image_size: Side in pixels of the squares that were encoded.
        encoder: Hash of the encoder's weights: another encoder gives other codes of the same codebook.
        policy: How images became square; of drawn ones, whether they show what their captions say.
        text_encoder: Fingerprint of the text encoder whose features are cached, empty without them.
        text_length: L, to which they are padded when they are read.
        text_padding: On which side.
        precision: In which the encoder computed: bf16 gives some images other codes than fp32.
    """

    fingerprint: str
    vocab_size: int
    num_tokens: int
    image_size: int
    encoder: str
    policy: str
    text_encoder: str = ""
    text_length: int = 0
    text_padding: str = "left"
    precision: Precision = "fp32"

    @property
    def codes_dtype(self) -> torch.dtype:
        """The narrowest type that shards keep codes in."""
        return torch.uint16 if self.vocab_size <= _UINT16_CODES else torch.int32

    @classmethod
    def from_values(cls, values: object, *, source: Path) -> Self:
        """Read what ``asdict`` gave; datasets older than the choice of a precision are of fp32.

        Raises:
            ValueError: If something is missing or makes no sense.
        """
        names = cls.__dataclass_fields__
        if not isinstance(values, dict) or values.keys() | {"precision"} != names.keys():
            raise ValueError(f"{source}: damaged header ({str(values)[:120]})")
        header = cls(**values)
        sizes = (header.vocab_size, header.num_tokens, header.image_size)
        if not all(isinstance(size, int) and size >= 1 for size in sizes) or not isinstance(header.fingerprint, str):
            raise ValueError(f"{source}: damaged header ({values})")
        return header


@dataclass(frozen=True, slots=True, eq=False)
class TokenShard:
    """The samples of one shard.

    Attributes:
        codes: (n, N) integers; of a shard that was read, the stored type (`TokenHeader.codes_dtype`).
        keys: n unique names.
        captions: n texts.
        skipped: "key: reason" of the images that were passed over.
        text: (rows, D) float16 features of all captions, None where they are not cached or not read.
        text_ends: (n,) int64, where the features of each caption end.
        sizes: (n, 2) int32, height and width of the images; None where they are not known.
    """

    codes: Tensor
    keys: Sequence[str]
    captions: Sequence[str]
    skipped: Sequence[str] = ()
    text: Tensor | None = None
    text_ends: Tensor | None = None
    sizes: Tensor | None = None

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.keys)

    def encoded(self, header: TokenHeader) -> EncodedImages:
        """All of them as `LaytonTokenizer.decode_images` takes them, to come back in the sizes of the originals.

        Args:
            header: That of the shard.

        Raises:
            ValueError: The sizes are not known or make no sense, or images became square in no way that can be undone.
        """
        if self.sizes is None:
            raise ValueError("this shard does not say what sizes its images had: decode its codes alone, to squares")
        for height, width in self.sizes.tolist():
            DEFAULT_LIMITS.check_size(width=width, height=height)
        policy = cast(FitPolicy, header.policy)
        plans = (Geometry.plan((h, w), header.image_size, policy=policy) for h, w in self.sizes.tolist())
        return EncodedImages(self.codes.long(), tuple(plans))


def shard_name(index: int) -> str:
    """File name of a shard."""
    return f"tokens-{index:05d}.safetensors"


def write_shard(path: Path, header: TokenHeader, shard: TokenShard) -> None:
    """Write one shard atomically; equal contents give equal bytes.

    Raises:
        ValueError: If lengths differ or codes are out of range.
    """
    if not len(shard.codes) == len(shard.keys) == len(shard.captions) or shard.codes.shape[1:] != (header.num_tokens,):
        raise ValueError(f"{path}: {tuple(shard.codes.shape)} codes, {len(shard.keys)} keys do not fit together")
    _check_codes(shard.codes, header, path)
    texts = {"key": list(shard.keys), "caption": list(shard.captions), "skipped": list(shard.skipped)}
    content = json.dumps(texts, ensure_ascii=False).encode("utf-8", "replace")
    tensors = {
        "codes": shard.codes.to(header.codes_dtype).contiguous(),
        "texts": torch.frombuffer(bytearray(content), dtype=torch.uint8),
    }
    if shard.sizes is not None:
        if shard.sizes.shape != (len(shard), 2):
            raise ValueError(f"{path}: {tuple(shard.sizes.shape)} sizes for {len(shard)} images")
        tensors["sizes"] = shard.sizes.to(torch.int32).contiguous()
    if shard.text is not None and shard.text_ends is not None:
        tensors |= {"text": shard.text.half().contiguous(), "text_ends": shard.text_ends}
    metadata = {"format": FORMAT, "header": json.dumps(asdict(header), sort_keys=True)}
    # one entry only: safetensors writes the metadata in the order of a hash map that differs from process to process
    metadata = {"layton": json.dumps(metadata, sort_keys=True)}
    write_atomically(path, partial(save_file, tensors, metadata=metadata))


def read_shard(path: Path, *, with_text: bool = True) -> tuple[TokenHeader, TokenShard]:
    """Read and check one shard.

    Args:
        path: The file.
        with_text: Whether cached text features are read; if not, only where they end.

    Raises:
        ValueError: If it is missing, cut off, damaged, something else, or holds codes out of range.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            header = _header_of(file, path)
            names = set(file.keys())
            if not {"codes", "texts"} <= names:
                raise ValueError(f"{path} has only {', '.join(sorted(names))}")
            codes: Tensor = file.get_tensor("codes")
            texts = _read_texts(file.get_tensor("texts"), path)
            ends = _text_ends(file, header, path)
            text = file.get_tensor("text") if with_text and ends is not None else None
            sizes = file.get_tensor("sizes") if "sizes" in names else None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    counts = {len(texts["key"]), len(texts["caption"]), len(texts["key"] if ends is None else ends)}
    if codes.shape != (len(texts["key"]), header.num_tokens) or len(counts) > 1:
        raise ValueError(f"{path}: {tuple(codes.shape)} codes, {len(texts['key'])} keys do not fit together")
    if sizes is not None and sizes.shape != (len(codes), 2):
        raise ValueError(f"{path}: {tuple(sizes.shape)} sizes for {len(codes)} images")
    if codes.dtype != header.codes_dtype:
        raise ValueError(f"{path}: codes are {codes.dtype}, expected {header.codes_dtype}")
    _check_codes(codes, header, path)
    return header, TokenShard(codes, texts["key"], texts["caption"], texts["skipped"], text, ends, sizes)


def sha256_of(path: Path) -> str:
    """Hash of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def write_sorted_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write JSON with sorted keys, atomically."""
    write_text(path, json.dumps(dict(values), indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def write_manifest(folder: Path, values: Mapping[str, Any]) -> None:
    """Write ``manifest.json``, the last file of a dataset, which with it is finished; it says its own digest."""
    write_sorted_json(folder / MANIFEST_NAME, {**values, _SEAL: _seal(values)})


def _seal(values: Mapping[str, Any]) -> str:
    own = {name: value for name, value in values.items() if name != _SEAL}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of this format.

    Raises:
        ValueError: If it cannot be read or is of another format.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ValueError(f"{path} is not of format {FORMAT!r}")
    return values


def shard_files(folder: Path) -> list[Path]:
    """Shards of a finished token dataset, in order.

    Raises:
        ValueError: If it is none, is not finished, or a shard is missing.
    """
    paths = [folder / name for name, _ in _listed(_manifest(folder), folder)]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{folder}: shard {path.name!r} of the manifest is not there")
    return paths


def shard_sizes(folder: Path) -> dict[Path, int]:
    """Shards of a finished token dataset, in order, and how many samples its manifest says each holds.

    Raises:
        ValueError: As `shard_files`.
    """
    listed = _listed(_manifest(folder), folder)
    return {path: int(entry["samples"]) for path, (_, entry) in zip(shard_files(folder), listed, strict=True)}


def _manifest(folder: Path) -> dict[str, Any]:
    if not (folder / MANIFEST_NAME).is_file():
        begun = (folder / PLAN_NAME).is_file()
        told = "an unfinished token dataset: run it again" if begun else f"no tokens{told_of_runs(folder)}"
        raise ValueError(f"{folder} holds {told}")
    values = read_json(folder / MANIFEST_NAME)
    counts = values.get("counts")
    whole = isinstance(counts, dict) and set(counts) >= _COUNTS  # of older ones nobody has said the digest
    if not whole or values.get(_SEAL, _seal(values)) != _seal(values):
        raise ValueError(f"{folder / MANIFEST_NAME} is damaged: it is not what was written")
    return values


def _listed(manifest: Mapping[str, Any], folder: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """Shards of a manifest by name, with what it says of each."""
    entries = manifest.get("shards")
    fields = {"file", "sha256", "samples", "skipped"}
    if not isinstance(entries, list) or not all(isinstance(each, dict) and fields <= each.keys() for each in entries):
        raise ValueError(f"{folder / MANIFEST_NAME} is damaged: it does not list its shards")
    for entry in entries:
        if Path(str(entry["file"])).name != entry["file"]:
            raise ValueError(f"{folder}: the manifest names {entry['file']!r}, which is no file of this folder")
    return [(str(entry["file"]), entry) for entry in entries]


def require_whole(folder: Path) -> None:
    """Refuse a dataset of which a byte is not the one that was written; reads all shards, some 1 GB in a second.

    Shards that were found whole and have their size and time of change since are not read again: `layton data verify`
    reads them always.

    Raises:
        ValueError: With the first shard that was changed.
    """
    listed = _listed(_manifest(folder), folder)
    seen = {name: [(folder / name).stat().st_size, (folder / name).stat().st_mtime_ns] for name, _ in listed}
    stamp = {"format": FORMAT, "manifest": sha256_of(folder / MANIFEST_NAME), "seen": seen}
    if _found_whole(folder, stamp):
        return
    with ExitStack() as stack:
        with suppress(OSError, FolderInUseError):  # of several processes one reads, where the folder can be written to
            stack.enter_context(lock_folder(folder, wait=True))
        if _found_whole(folder, stamp):
            return
        for name, entry in listed:
            if sha256_of(folder / name) != entry["sha256"]:
                raise ValueError(f"{folder / name} is not what was written (sha256): `layton data verify {folder}`")
        with suppress(OSError):
            write_sorted_json(folder / WHOLE_NAME, stamp)


def _found_whole(folder: Path, stamp: Mapping[str, Any]) -> bool:
    with suppress(ValueError):
        return (folder / WHOLE_NAME).is_file() and read_json(folder / WHOLE_NAME) == stamp
    return False


def verify(folder: Path) -> list[str]:
    """Every fault of a token dataset, one line each; none means that it is whole.

    Raises:
        ValueError: If there is no finished token dataset.
    """
    manifest = _manifest(folder)
    header = TokenHeader.from_values(manifest.get("header"), source=folder / MANIFEST_NAME)
    faults: list[str] = []
    digests: dict[Path, NDArray[np.int64]] = {}  # of keys, in place of these: eight bytes each
    for name, entry in _listed(manifest, folder):
        path = folder / name
        if not path.is_file():
            faults.append(f"{name}: is not there")
            continue
        if sha256_of(path) != entry["sha256"]:
            faults.append(f"{path.name}: its bytes are not those that were written (sha256)")
            continue
        found, shard = read_shard(path)
        if found != header:
            faults.append(f"{path.name}: made by something else ({differences(asdict(header), asdict(found))})")
        if (len(shard), len(shard.skipped)) != (entry["samples"], entry["skipped"]):
            faults.append(f"{path.name}: {len(shard)} samples, the manifest says {entry['samples']}")
        digests[path] = key_digests(shard.keys)
    faults += _repeated(digests)
    counts = manifest["counts"]
    written = sum(int(entry["samples"]) for entry in manifest["shards"])
    if written != counts["samples"] or counts["inputs"] != counts["samples"] + counts["skipped"]:
        faults.append(f"{MANIFEST_NAME}: counts {counts} do not add up with {written} samples")
    return faults


def _repeated(digests: Mapping[Path, NDArray[np.int64]]) -> list[str]:
    """Keys in several of these shards, which are read again only where digests are alike."""
    alike, counts = np.unique(np.concatenate([*digests.values(), np.zeros(0, np.int64)]), return_counts=True)
    suspects = alike[counts > 1]
    owner: dict[str, str] = {}
    faults = []
    for path, own in digests.items():
        rows = np.flatnonzero(np.isin(own, suspects)).tolist()
        keys = read_shard(path)[1].keys if rows else []
        for row in rows:
            if keys[row] in owner:
                faults.append(f"{path.name}: key {keys[row]!r} is in {owner[keys[row]]} too")
            owner[keys[row]] = path.name
    return faults


def _header_of(file: Any, path: Path) -> TokenHeader:
    try:
        metadata = json.loads((file.metadata() or {})["layton"])
        if metadata["format"] != FORMAT:
            raise ValueError(f"format {metadata['format']!r}")
        values = json.loads(metadata["header"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        told = f"{path} is no token shard ({error}); `layton decode` takes files of `layton encode`"
        raise ValueError(told) from error
    return TokenHeader.from_values(values, source=path)


def _read_texts(content: Tensor, path: Path) -> dict[str, list[str]]:
    try:
        texts = json.loads(bytes(content.to(torch.uint8).flatten().numpy()))
        lists = {name: texts[name] for name in ("key", "caption", "skipped")}
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged texts ({error})") from error
    if not all(isinstance(rows, list) and all(isinstance(row, str) for row in rows) for rows in lists.values()):
        raise ValueError(f"{path}: damaged texts (not lists of texts)")
    return lists


def _check_codes(codes: Tensor, header: TokenHeader, path: Path) -> None:
    values = codes.cpu().numpy()  # torch finds no extremes of uint16
    if values.size and not 0 <= int(values.min()) <= int(values.max()) < header.vocab_size:
        raise ValueError(f"{path}: codes are not in [0, {header.vocab_size})")


def _text_ends(file: Any, header: TokenHeader, path: Path) -> Tensor | None:
    """Where the features of each caption end; None where none are cached. The features themselves are not read."""
    names = set(file.keys())
    if not names & {"text", "text_ends"} and not header.text_encoder:
        return None
    if names >= {"text", "text_ends"}:
        shape, ends = file.get_slice("text").get_shape(), file.get_tensor("text_ends")
        if len(shape) == 2 and ends.ndim == 1 and ends.dtype == torch.int64:
            lengths = torch.diff(ends, prepend=ends.new_zeros(1))
            fits = not len(ends) or 0 <= int(lengths.min()) <= int(lengths.max()) <= header.text_length
            if fits and int(lengths.sum()) == shape[0]:
                return ends
    raise ValueError(f"{path}: damaged text features")
