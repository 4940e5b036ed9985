"""Files of codes: one safetensors file that says which tokenizer made it, from which images, and how they were fitted.

Tensors: ``codes`` (n, N) int16 or int32; ``geometry`` (n, 6) int32, the original height and width, then the box
(`layton.data.geometry.Geometry`); ``names``, the UTF-8 bytes of a JSON list. Everything else is in the metadata.
Files are written as a stream: a million images take no more memory than ten. (Temporary files lie beside the result.)
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from layton.data.geometry import FIT_POLICIES, FitPolicy, Geometry
from layton.data.images import DEFAULT_LIMITS
from layton.folder import full_disk_told, write_atomically

if TYPE_CHECKING:
    from layton.tokenizer import EncodedImages, LaytonTokenizer

FORMAT = "layton codes 1"
_GEOMETRY_FIELDS = 6
_INT16_CODES = 2**15
_SCAN_ROWS = 4096


@dataclass(frozen=True, slots=True)
class CodesHeader:
    """What all codes of a file have in common.

    Attributes:
        fingerprint: Of the tokenizer's codebook.
        vocab_size: V.
        num_tokens: N.
        image_size: Side in pixels of the squares that were encoded.
        policy: How images became square.
        precision: In which the encoder computed: fp32 or bf16; files that do not say it are of fp32.
    """

    fingerprint: str
    vocab_size: int
    num_tokens: int
    image_size: int
    policy: FitPolicy
    precision: str = "fp32"

    def to_metadata(self) -> dict[str, str]:
        """Strings, as safetensors wants them."""
        return {"format": FORMAT, **{name: str(getattr(self, name)) for name in self.__dataclass_fields__}}

    @classmethod
    def from_metadata(cls, values: Mapping[str, str], *, source: Path) -> Self:
        """Inverse of `to_metadata`.

        Raises:
            ValueError: If something is missing or makes no sense.
        """
        if values.get("format") != FORMAT:
            raise ValueError(
                f"{source} is no codes file: its format is {values.get('format')!r}, not {FORMAT!r} (token shards: "
                "`layton data decode`)"
            )
        try:
            vocab_size, num_tokens, image_size = (
                int(values[name]) for name in ("vocab_size", "num_tokens", "image_size")
            )
            fingerprint, policy = values["fingerprint"], values["policy"]
            precision = values.get("precision", "fp32")
        except (KeyError, ValueError) as error:
            raise ValueError(f"{source}: damaged metadata ({error})") from error
        if (
            policy not in FIT_POLICIES
            or precision not in ("fp32", "bf16")
            or min(vocab_size, num_tokens, image_size) < 1
        ):
            raise ValueError(f"{source}: damaged metadata ({dict(values)})")
        return cls(fingerprint, vocab_size, num_tokens, image_size, policy, precision)


class CodesWriter:
    """Writes a codes file batch by batch; it appears under its name only when `finish` was called.

    Args:
        path: The file; its folder is made.
        header: What all codes have in common.

    Raises:
        ValueError: If there is a folder of that name.
    """

    def __init__(self, path: Path, header: CodesHeader) -> None:
        if path.is_dir():
            raise ValueError(f"{path} is a folder, and a file is to be written")
        self.path = path
        self.header = header
        self.count = 0
        self._dtype = np.dtype("<i2" if header.vocab_size <= _INT16_CODES else "<i4")
        self._stack = ExitStack()
        self._stack.enter_context(full_disk_told(path))
        place = next(folder for folder in path.absolute().parents if folder.is_dir())
        self._parts: dict[str, IO[bytes]] = {}
        for name in ("codes", "geometry", "names"):
            part = tempfile.TemporaryFile(dir=place)  # noqa: SIM115  # closed with the writer
            self._parts[name] = self._stack.enter_context(part)

    def __enter__(self) -> Self:
        """The writer."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Drop the temporary files."""
        self._stack.__exit__(kind, error, trace)

    def add(self, codes: Tensor, names: Sequence[str], geometries: Sequence[Geometry]) -> None:
        """Append images.

        Args:
            codes: (B, N) integers in [0, V).
            names: B names.
            geometries: B geometries.
        """
        rows = [(*geometry.original_size, *geometry.box) for geometry in geometries]
        self._parts["codes"].write(codes.cpu().numpy().astype(self._dtype).tobytes())
        self._parts["geometry"].write(np.array(rows, dtype="<i4").tobytes())
        for name in names:
            self._parts["names"].write(("," if self.count else "[").encode() + json.dumps(name).encode())
            self.count += 1

    def finish(self) -> None:
        """Write the file.

        Raises:
            ValueError: If nothing was added.
        """
        if not self.count:
            raise ValueError("no images to write codes of")
        self._parts["names"].write(b"]")
        sizes = {name: part.tell() for name, part in self._parts.items()}
        shapes = {
            "codes": ("I16" if self._dtype.itemsize == 2 else "I32", [self.count, self.header.num_tokens]),
            "geometry": ("I32", [self.count, _GEOMETRY_FIELDS]),
            "names": ("U8", [sizes["names"]]),
        }
        entries: dict[str, Any] = {"__metadata__": self.header.to_metadata()}
        end = 0
        for name, (dtype, shape) in shapes.items():
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + sizes[name]]}
            end += sizes[name]
        write_atomically(self.path, lambda part: self._assemble(part, json.dumps(entries).encode()))

    def _assemble(self, path: Path, head: bytes) -> None:
        """Safetensors: length of the JSON header in 8 bytes, the header, padded to 8, then the tensors."""
        head += b" " * (-len(head) % 8)
        with path.open("wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            for part in self._parts.values():
                part.seek(0)
                shutil.copyfileobj(part, file, 2**20)


class CodesFile:
    """A codes file, checked in form when it is opened and read piece by piece.

    Args:
        path: The file.

    Attributes:
        header: What all codes have in common.
        names: Of the images.

    Raises:
        ValueError: If it is missing, cut off, damaged, or something else.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            tokens = " (tokens of a dataset: `layton data decode`)" if path.is_dir() else ""
            raise ValueError(f"{path}: no such file{tokens}")
        try:
            self._file = safe_open(str(path), framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
        self.path = path
        self.header = CodesHeader.from_metadata(self._file.metadata() or {}, source=path)
        missing = {"codes", "geometry", "names"} - set(self._file.keys())
        if missing:
            raise ValueError(f"{path} has no {', '.join(sorted(missing))}")
        self.names = self._read_names()
        for name, columns in (("codes", self.header.num_tokens), ("geometry", _GEOMETRY_FIELDS)):
            shape = self._file.get_slice(name).get_shape()
            if shape != [len(self.names), columns]:
                raise ValueError(f"{path}: {name} is {shape}, expected {[len(self.names), columns]}")

    def __len__(self) -> int:
        """Number of images."""
        return len(self.names)

    def codes(self, start: int, stop: int) -> Tensor:
        """Codes (stop - start, N) int64 of some images; floating-point ones stay what they are, to be refused."""
        part: Tensor = self._file.get_slice("codes")[start:stop]
        return part if part.is_floating_point() else part.long()

    def geometries(self, start: int, stop: int) -> list[Geometry]:
        """How some images were fitted.

        Raises:
            ValueError: If one makes no sense, or is of an image that is larger than any that is read.
        """
        rows = self._file.get_slice("geometry")[start:stop].tolist()
        try:
            for row in rows:
                DEFAULT_LIMITS.check_size(width=row[1], height=row[0])
            return [
                Geometry((row[0], row[1]), self.header.image_size, self.header.policy, tuple(row[2:])) for row in rows
            ]
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.path}, images {start} to {stop - 1}: {error}") from error

    def pieces(self, size: int = _SCAN_ROWS) -> Iterator[tuple[int, int]]:
        """(start, stop) of consecutive pieces of at most ``size`` images."""
        for start in range(0, len(self), size):
            yield start, min(start + size, len(self))

    def _read_names(self) -> list[str]:
        content = self._file.get_tensor("names")
        try:
            names = json.loads(bytes(content.to(torch.uint8).flatten().numpy()))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.path}: the names are damaged ({error})") from error
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{self.path}: the names are damaged (not a list of texts)")
        return names


def is_codes_file(path: Path) -> bool:
    """Whether a file holds codes, whole."""
    try:
        CodesFile(path)
    except ValueError:
        return False
    return True


def codes_header(model: LaytonTokenizer, policy: FitPolicy, precision: str = "fp32") -> CodesHeader:
    """What a codes file of this tokenizer says about itself."""
    return CodesHeader(model.fingerprint(), model.vocab_size, model.num_tokens, model.image_size, policy, precision)


def require_codes_of(model: LaytonTokenizer, file: CodesFile) -> None:
    """Refuse codes that this tokenizer did not make or cannot mean, and geometries that make no sense.

    Raises:
        ValueError: With both fingerprints, or the place of the first wrong code.
    """
    ours = codes_header(model, file.header.policy, file.header.precision)
    if file.header.fingerprint != ours.fingerprint:
        raise ValueError(
            f"{file.path} was made by another tokenizer: its codes have fingerprint {file.header.fingerprint}, "
            f"this tokenizer's is {ours.fingerprint}"
        )
    if file.header != ours:
        raise ValueError(f"{file.path} does not fit this tokenizer: it says {file.header}, expected {ours}")
    for start, stop in file.pieces():
        try:
            model.quantizer.check_codes(file.codes(start, stop), grid=model.grid)
        except ValueError as error:
            raise ValueError(f"{file.path}, images {start} to {stop - 1}: {error}") from error
        file.geometries(start, stop)


@dataclass(frozen=True, slots=True, eq=False)
class ImageCodes:
    """What a codes file holds.

    Attributes:
        encoded: Codes and geometries, as `LaytonTokenizer.decode_images` takes them.
        names: Of the images.
        header: Which tokenizer made the codes, and how.
    """

    encoded: EncodedImages
    names: tuple[str, ...]
    header: CodesHeader

    @property
    def codes(self) -> Tensor:
        """(n, N) int64."""
        return self.encoded.codes


def load_codes(path: Path | str, *, tokenizer: LaytonTokenizer | None = None) -> ImageCodes:
    """Read a file that `save_codes` or ``layton encode`` wrote.

    Args:
        path: The file.
        tokenizer: Whose codes they should be; None does not check that.

    Raises:
        ValueError: It is missing, damaged or something else, or the codes are of another tokenizer.
    """
    from layton.tokenizer import EncodedImages

    file = CodesFile(Path(path))
    if tokenizer is not None:
        require_codes_of(tokenizer, file)
    encoded = EncodedImages(file.codes(0, len(file)), tuple(file.geometries(0, len(file))))
    return ImageCodes(encoded, tuple(file.names), file.header)


def save_codes(
    path: Path | str, encoded: EncodedImages, *, tokenizer: LaytonTokenizer, names: Sequence[str] | None = None
) -> None:
    """Write codes as ``layton encode`` does; ``layton decode`` reads them.

    Args:
        path: The file to write, or to replace.
        encoded: From `LaytonTokenizer.encode_images`, of one policy.
        tokenizer: Which made them.
        names: Of the images; their numbers by default.

    Raises:
        ValueError: There are no codes, as many names as images are not given, or images were fitted in several ways.
    """
    policies = {geometry.policy for geometry in encoded.geometries}
    if len(policies) > 1:
        raise ValueError(f"a codes file is of one policy, these images were fitted by {', '.join(sorted(policies))}")
    told = [str(number) for number in range(len(encoded))] if names is None else list(names)
    if len(told) != len(encoded):
        raise ValueError(f"{len(encoded)} images but {len(told)} names")
    header = codes_header(tokenizer, policies.pop() if policies else "crop")
    with CodesWriter(Path(path), header) as writer:
        writer.add(encoded.codes, told, encoded.geometries)
        writer.finish()
