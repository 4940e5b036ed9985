"""Reading a checkpoint that somebody else made: tensors only, nothing is executed.

``.safetensors`` files cannot hold code. Everything else goes through ``torch.load(weights_only=True)``; a file that
needs more than that is refused, there is no fallback.
"""

from __future__ import annotations

import argparse
import pickle
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

CONTAINERS = ("model", "state_dict", "module", "ema")
_SHOWN_PROBLEMS = 10


class ConvertError(ValueError):
    """A checkpoint that cannot be converted; ``problems`` lists every reason, one readable line each."""

    def __init__(self, source: Path | str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__(f"cannot convert {source}, {len(problems)} problem(s):\n  " + "\n  ".join(problems))

    def told(self) -> str:
        """What it says, of many problems the first ones."""
        first, more = str(self).splitlines()[0], len(self.problems) - _SHOWN_PROBLEMS
        shown = [f"  {problem}" for problem in self.problems[:_SHOWN_PROBLEMS]]
        return "\n".join([first, *shown, *([f"  and {more} more"] if more > 0 else [])])


def read_checkpoint(path: str | Path, *, averaged: bool = False) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint under their own names.

    Args:
        path: A ``.safetensors`` file, or a file of ``torch.save``. The tensors may lie at the top, or under one of
            ``model``, ``state_dict``, ``module`` and ``ema`` (in safetensors: as a common prefix).
        averaged: Take ``ema`` before the others, where a file has both.

    Returns:
        Name to tensor, without the container's name.

    Raises:
        ConvertError: There is no such file, it is damaged, or it holds more than tensors.
    """
    file = Path(path)
    if file.is_dir():
        raise ConvertError(file, ["a folder: name the file in it"])
    if not file.is_file():
        raise ConvertError(file, ["no such file"])
    if file.suffix == ".safetensors":
        try:
            return without_container(load_file(str(file)))
        except SafetensorError as error:
            raise ConvertError(file, [f"not a whole safetensors file: {error}"]) from error
    return named_tensors(_load_pickle(file), source=file, averaged=averaged)


def _load_pickle(file: Path) -> object:
    try:
        # Training scripts store their arguments beside the weights: a Namespace is a plain bag of values.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about pickles of other protocols, which are refused below
            # Only zip archives can be memory-mapped; the old format is read whole.
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        advice = "it holds more than tensors and is not opened; ask its author for a safetensors file"
        raise ConvertError(file, [f"{advice} ({str(error).splitlines()[0]})"]) from error
    except (RuntimeError, EOFError, KeyError, IndexError, AttributeError, TypeError, ValueError, OSError) as error:
        # What torch raises for cut and foreign files is not one type.
        raise ConvertError(file, [f"not a whole file of torch.save: {type(error).__name__} {error}"]) from error


def named_tensors(loaded: object, *, source: Path, averaged: bool = False) -> dict[str, Tensor]:
    """The state dict in what ``torch.load`` gave; see `read_checkpoint`.

    Raises:
        ConvertError: There is none, or it holds values that are not tensors.
    """
    inner, order = loaded, sorted(CONTAINERS, key=lambda name: averaged and name != "ema")
    while isinstance(inner, Mapping):
        container = next((name for name in order if isinstance(inner.get(name), Mapping)), None)
        if container is None:
            break
        inner = inner[container]
    if not isinstance(inner, Mapping) or not inner:
        raise ConvertError(source, [f"no weights at the top nor under {', '.join(CONTAINERS)}"])
    problems: list[str] = []
    tensors: dict[str, Tensor] = {}
    for name, value in inner.items():
        if isinstance(name, str) and isinstance(value, Tensor):
            tensors[name] = value
        else:
            problems.append(f"not a tensor: {name} ({type(value).__name__})")
    if problems:
        raise ConvertError(source, problems)
    return without_container(tensors)


def without_container(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop a prefix ``model.``, ``state_dict.`` or ``module.`` (DistributedDataParallel) that all names share."""
    plain = dict(state)
    while plain:
        prefix = next((f"{name}." for name in CONTAINERS if all(key.startswith(f"{name}.") for key in plain)), None)
        if prefix is None:
            break
        plain = {key.removeprefix(prefix): value for key, value in plain.items()}
    return plain
