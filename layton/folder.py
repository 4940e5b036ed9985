"""How a trained part lies on disk: one folder with ``config.json`` and ``model.safetensors``, written atomically.

A file appears under its name only when it is whole: it is written beside its final place and then renamed, so that a
killed process leaves the old file or none.
"""

from __future__ import annotations

import errno
import hashlib
import importlib
import json
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
ALLOWED_PREFIXES = ("layton.", "generation.")

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SAMPLED = 1024
_UMASK = os.umask(0)
os.umask(_UMASK)
M = TypeVar("M", bound=nn.Module)
JsonValue = None | bool | int | float | str | list["JsonValue"] | dict[str, "JsonValue"]


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file in the folder of ``path``, flush it to disk and rename it to ``path``.

    The one way in which this library writes a file. The temporary one lies in the same folder, so that the rename
    never is a copy; after it the folder is flushed too, so that the name survives a power cut. A link stays one, and
    what is no file (``/dev/stdout``, a named pipe) is written into.

    Args:
        path: Final place; its folder is made.
        write: Writes a whole file to the path that it is given.

    Raises:
        OSError: It could not be written; of a full disk the message says which file and how much room there is.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        _write_into(path, write)
        return
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        with full_disk_told(path):
            write(part)
            share(part)
            with part.open("rb") as written:
                os.fsync(written.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _write_into(device: Path, write: Callable[[Path], object]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "part"
        write(part)
        with part.open("rb") as source, device.open("wb") as target:
            shutil.copyfileobj(source, target)


@contextmanager
def full_disk_told(path: Path) -> Iterator[None]:
    """Within it an error of a full disk, or of a quota or limit, names what could not be written.

    Raises:
        OSError: In place of that error.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _number_of(error)
        if number not in _FULL:
            raise
        reason = os.strerror(number).lower()
        if number == errno.ENOSPC:
            there = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
            reason += f", {shutil.disk_usage(there).free / 1e6:.1f} MB are free"
        raise OSError(f"{path} could not be written: {reason}") from error


def _number_of(error: OSError | SafetensorError) -> int:
    """The system's number of an error, which safetensors tells in words alone; 0 if there is none."""
    if isinstance(error, OSError):
        return error.errno or 0
    return next((number for number in _FULL if f"(os error {number})" in str(error)), 0)


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, whole or not at all; see `write_atomically`."""
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_json(path: Path | str, figures: Mapping[str, Any]) -> None:
    """Write figures as JSON, whole or not at all; see `write_atomically`.

    Args:
        path: Target file; its folder is made.
        figures: Plain data; paths become text, tensors and arrays lists.

    Raises:
        ValueError: A value that JSON cannot hold, numbers that are not finite included.
    """
    try:
        text = json.dumps(figures, indent=2, allow_nan=False, default=_plain)
    except TypeError as error:
        raise ValueError(f"cannot write {path}: {error}") from error
    write_text(Path(path), text + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # tensors, arrays and their scalars
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not plain data")


def share(file: Path) -> None:
    """Give a file the permissions that any new file would have: safetensors and temporary files come with fewer."""
    file.chmod(0o666 & ~_UMASK)


def save_config(folder: Path, config: Mapping[str, JsonValue]) -> None:
    """Write ``config`` as ``config.json`` into ``folder``."""
    write_text(folder / CONFIG_NAME, json.dumps(dict(config), indent=2) + "\n")


def load_config(folder: Path, *, expected_class: str) -> dict[str, JsonValue]:
    """Read ``config.json`` of ``folder`` and check that it describes ``expected_class``.

    Raises:
        ValueError: The file is missing, is not a JSON object, or names another class.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise ValueError(_no_part(path.parent))
    config = read_json(path)
    if config.get("class") != expected_class:
        raise ValueError(f"{path} describes {config.get('class')!r}, not {expected_class!r}")
    return config


def _no_part(folder: Path) -> str:
    if (folder / "export").is_dir():
        return f"{folder} is the folder of a run: what it exported is {folder / 'export'}"
    if folder.is_dir():
        return f"{folder} holds no {CONFIG_NAME}: not a saved part"
    return f"{folder} is no folder{told_of_runs(folder)}"


def told_of_runs(folder: Path) -> str:
    """What to do about a folder that is not there, where run files have runs write them; else nothing."""
    return (
        "; if an earlier run is to write it, make that run first, or take an embedded part (mini)"
        if "runs" in folder.parts[:-1]
        else ""
    )


def read_json(path: Path) -> dict[str, JsonValue]:
    """The JSON object in a file.

    Raises:
        ValueError: It is none.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a JSON object")
    return values


def save_tensors(path: Path, tensors: Mapping[str, Tensor], *, dtype: torch.dtype | None = None) -> None:
    """Write tensors as safetensors; floating-point ones are cast to ``dtype`` if it is given."""

    def prepare(tensor: Tensor) -> Tensor:
        cast = dtype is not None and tensor.is_floating_point()
        return tensor.detach().to(device="cpu", dtype=dtype if cast else tensor.dtype).contiguous().clone()

    ready = {name: prepare(tensor) for name, tensor in tensors.items()}
    write_atomically(path, lambda part: save_file(ready, str(part)))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        ValueError: The file does not exist or is damaged.
    """
    if not path.is_file():
        raise ValueError(f"weights file {path} does not exist")
    try:
        return dict(load_file(str(path)))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def mismatches(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """Every missing, unknown and mis-shaped key of ``given``, one readable line each, in the order of their names."""
    lines = [f"missing {name} {tuple(expected[name].shape)}" for name in sorted(expected.keys() - given.keys())]
    lines += [f"unknown {name} {tuple(given[name].shape)}" for name in sorted(given.keys() - expected.keys())]
    lines += [
        f"mis-shaped {name}: {tuple(given[name].shape)} in the file, {tuple(expected[name].shape)} in the model"
        for name in sorted(expected.keys() & given.keys())
        if expected[name].shape != given[name].shape
    ]
    return lines


def require_match(
    expected: Mapping[str, Tensor], given: Mapping[str, Tensor], *, source: Path | str, target: str
) -> None:
    """Stop unless ``given`` has exactly the keys and shapes of ``expected``.

    Raises:
        ValueError: Keys are missing, unknown or mis-shaped; all of them are listed.
    """
    problems = mismatches(expected, given)
    if problems:
        raise ValueError(f"{source} does not fit {target}:\n  " + "\n  ".join(problems))


def weights_hashes(state: Mapping[str, Tensor]) -> tuple[str, str, str]:
    """Hashes of weights, as they are when stored in fp16, in bf16, and first in fp16 and then in bf16; 16 hex digits.

    Those of weights that were stored in one of these ways have one in common with those of the weights as they were:
    rounded twice, numbers are others than rounded once. Of each tensor its name, its shape and up to 1,024 of its
    numbers count: quick also for SDXL.
    """
    samples = {
        f"{name} {tuple(tensor.shape)}": tensor.detach().flatten()[:: max(1, tensor.numel() // _SAMPLED)][:_SAMPLED]
        for name, tensor in sorted(state.items())
    }
    found = []
    for dtypes in ((torch.float16,), (torch.bfloat16,), (torch.float16, torch.bfloat16)):
        total = hashlib.sha256()
        for name, values in samples.items():
            stored = values.cpu()
            for dtype in dtypes:
                stored = stored.to(dtype)
            total.update(name.encode())
            total.update(stored.to(torch.float16).contiguous().numpy().tobytes())
        found.append(total.hexdigest()[:16])
    return found[0], found[1], found[2]


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], *, source: Path | str) -> None:
    """Copy ``tensors`` into ``module``, which must have exactly these keys and shapes.

    Raises:
        ValueError: Keys are missing, unknown or mis-shaped; all of them are listed.
    """
    require_match(module.state_dict(), tensors, source=source, target=type(module).__name__)
    module.load_state_dict(dict(tensors), strict=True)


def read_class(folder: Path | str) -> str:
    """The class that the ``config.json`` of a folder names.

    Raises:
        ValueError: If there is no such file or no such name.
    """
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        raise ValueError(_no_part(path.parent))
    name = read_json(path).get("class")
    if not isinstance(name, str):
        raise ValueError(f"{path} names no class")
    return name


def class_name(cls: type) -> str:
    """Dotted name of a class, as `save_pretrained` writes it."""
    return f"{cls.__module__}.{cls.__qualname__}"


def resolve_class(name: str, base: type, allow: Sequence[str] = ()) -> Any:
    """The class that a file names, if its name is allowed; nothing is imported before the name is checked.

    Allowed are classes of this library, and such as are there already: a program, or a run file with ``--allow``, that
    works with classes of its own has imported them.

    Args:
        name: Dotted name.
        base: What it must derive from.
        allow: More prefixes that are allowed.

    Raises:
        ValueError: If the name is not allowed, or is no such class.
    """
    module, _, attribute = name.rpartition(".")
    there = getattr(sys.modules.get(module), attribute, None)
    if isinstance(there, type) and issubclass(there, base):
        return there
    if not name.startswith((*ALLOWED_PREFIXES, *allow)):
        known = ", ".join((*ALLOWED_PREFIXES, *allow))
        raise ValueError(f"class {name!r} is not allowed; allowed are {known}, and what was imported before")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"there is no class {name!r}") from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(f"{name!r} is no {base.__name__}")
    return found


def save_pretrained(
    module: nn.Module, config: Mapping[str, JsonValue], folder: Path | str, *, dtype: torch.dtype | None = None
) -> None:
    """Write a module as constructor arguments and weights.

    Args:
        module: What to save.
        config: The constructor's arguments.
        folder: Where to.
        dtype: Type that floating-point weights are cast to; None keeps them.
    """
    save_config(Path(folder), {"class": class_name(type(module)), **config})
    save_tensors(Path(folder) / WEIGHTS_NAME, module.state_dict(), dtype=dtype)


def load_pretrained(cls: type[M], folder: Path | str) -> M:
    """Build a module from what `save_pretrained` wrote: float32, eval mode, every key checked.

    Raises:
        ValueError: If the folder holds something else, or keys are missing, unknown or mis-shaped.
    """
    config = load_config(Path(folder), expected_class=class_name(cls))
    del config["class"]
    try:
        module = cls(**config)
    except TypeError as error:
        raise ValueError(f"{folder}: config does not fit {cls.__name__}: {error}") from error
    tensors = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in load_tensors(Path(folder) / WEIGHTS_NAME).items()
    }
    load_into(module, tensors, source=folder)
    return module.eval()
