"""Folders with a quantizer: ``config.json`` and ``model.safetensors``, written atomically, read strictly."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from layton.folder import CONFIG_NAME, WEIGHTS_NAME, class_name, resolve_class, write_atomically, write_text

if TYPE_CHECKING:
    from layton.quantizers.base import Quantizer


def save_quantizer(quantizer: Quantizer, folder: str | os.PathLike[str]) -> None:
    """Writes what encoding and decoding need; averages and collected features of the training are left out."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().float().cpu().contiguous() for name, tensor in quantizer._weights().items()}
    kind = type(quantizer)
    name = kind.__name__ if kind.__module__.startswith(f"{__package__}.") else class_name(kind)
    config = {"class": name, **quantizer.config(), "fingerprint": quantizer.fingerprint()}
    write_atomically(folder / WEIGHTS_NAME, lambda path: save_file(weights, path, metadata={"format": "pt"}))
    write_text(folder / CONFIG_NAME, json.dumps(config, indent=2) + "\n")


def load_quantizer(folder: str | os.PathLike[str], classes: Mapping[str, type[Quantizer]], base: type) -> Quantizer:
    """Rebuilds a quantizer from its folder; see `Quantizer.from_pretrained`.

    Args:
        folder: Its own.
        classes: The library's, by the names that files give them.
        base: What a class of another name, a dotted one, must derive from.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"no quantizer in {folder}: {CONFIG_NAME} is missing") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder / CONFIG_NAME} is not valid JSON: {error}") from error
    name = config.pop("class", None) if isinstance(config, dict) else config
    if not isinstance(name, str) or (name not in classes and "." not in name):
        raise ValueError(f"{folder / CONFIG_NAME} names the quantizer {name!r}; known here: {', '.join(classes)}")
    quantizer = _build(classes[name] if name in classes else resolve_class(name, base), config, folder)
    _load_weights(quantizer, folder / WEIGHTS_NAME)
    expected = config.get("fingerprint")
    if expected is not None and expected != quantizer.fingerprint():
        raise ValueError(f"the codes in {folder} were changed: {quantizer.fingerprint()}, and not {expected}")
    return quantizer.eval()


def _build(cls: type[Quantizer], config: dict[str, Any], folder: Path) -> Quantizer:
    arguments = {name: value for name, value in config.items() if name != "fingerprint"}
    unknown = sorted(set(arguments) - set(inspect.signature(cls).parameters))
    if unknown:
        raise ValueError(f"{folder / CONFIG_NAME} has settings that {cls.__name__} does not know: {', '.join(unknown)}")
    try:
        return cls(**arguments)
    except TypeError as error:
        raise ValueError(f"{folder / CONFIG_NAME} has a value of a wrong type: {error}") from error


@torch.no_grad()
def _load_weights(quantizer: Quantizer, path: Path) -> None:
    try:
        tensors = load_file(path)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing") from error
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    expected = quantizer._weights()
    faults = [f"missing {name}" for name in expected if name not in tensors]
    faults += [f"unknown {name}" for name in tensors if name not in expected]
    for name in expected.keys() & tensors.keys():
        if tensors[name].shape != expected[name].shape:
            faults.append(f"{name} is {tuple(tensors[name].shape)} and not {tuple(expected[name].shape)}")
        elif not bool(torch.isfinite(tensors[name]).all()):
            faults.append(f"{name} holds NaN or infinity")
    if faults:
        raise ValueError(f"{path} does not fit {type(quantizer).__name__}: {'; '.join(sorted(faults))}")
    quantizer._load_weights({name: tensor.float() for name, tensor in tensors.items()})


def copy_weights(targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copies tensors into the targets of the same name, in place."""
    for name, target in targets.items():
        target.data.copy_(tensors[name])
