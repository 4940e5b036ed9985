"""``layton info``: what is installed, what is embedded, and what a run will need."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from layton.commands.reports import write_json

_PACKAGES = ("layton", "torch", "torchvision", "lightning", "diffusers", "transformers", "peft", "webdataset")
_ASSETS = Path(__file__).resolve().parent.parent / "assets"


def info(*, config: list[str] | None = None, allow: list[str] | None = None, json: str | None = None) -> None:
    """Print versions, devices and the embedded models with their cards; with a run file, what the run will need.

    Args:
        config: run files as for `layton fit`, later ones over earlier ones; their task is built to count parameters.
        allow: modules of your own that run files may name.
        json: write the figures to this file as well.
    """
    figures: dict[str, Any] = {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "devices": _devices(),
        "models": embedded_models(_ASSETS),
    }
    if config:
        figures["run"] = run_needs(config, allow=allow or ())
    _print(figures)
    if json is not None:
        write_json(json, figures)


def embedded_models(folder: Path) -> list[dict[str, Any]]:
    """Models shipped in a folder: name, megabytes, path of the card and its first line of text."""
    models = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        weights = sorted(path.rglob("*.safetensors")) if path.is_dir() else []
        if weights and path.name != "interim":  # those belong to no name
            card = path / "README.md"
            lines = card.read_text(encoding="utf-8").splitlines() if card.is_file() else []
            title = next((line.lstrip("# ").strip() for line in lines if line.startswith("#")), "no card")
            models.append(
                {
                    "name": path.name,
                    "megabytes": round(sum(file.stat().st_size for file in weights) / 1e6, 2),
                    "card": str(card) if lines else None,
                    "title": title,
                }
            )
    return models


def run_needs(config: list[str], *, allow: Sequence[str] = ()) -> dict[str, Any]:
    """Parameters of a run per part, and the bytes that weights, gradients and AdamW's state take in float32.

    Args:
        config: run files.
        allow: modules, beside this library's, that they may name.

    Returns:
        task, parts (name, parameters, trainable), parameters, trainable, state_megabytes. Activations come on top and
        depend on the batch.
    """
    from layton.training import build_task

    task = build_task([word for path in config for word in ("--config", path)], allow=allow)
    parts = [
        {
            "name": name,
            "class": type(module).__name__,
            "parameters": sum(p.numel() for p in module.parameters()),
            "trainable": sum(p.numel() for p in module.parameters() if p.requires_grad),
        }
        for name, module in task.named_children()
    ]
    every = sum(p.numel() for p in task.parameters())
    trained = sum(p.numel() for p in task.trainable_parameters())
    return {
        "task": f"{type(task).__module__}.{type(task).__qualname__}",
        "parts": parts,
        "parameters": every,
        "trainable": trained,
        "state_megabytes": round(4 * (every + 4 * trained) / 1e6, 2),  # weights; gradient, two moments, average
    }


def _devices() -> dict[str, Any]:
    import torch

    return {
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cuda": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "mps": torch.backends.mps.is_available(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _print(figures: dict[str, Any]) -> None:
    lines = ["  ".join(f"{name} {number or 'absent'}" for name, number in figures["versions"].items())]
    lines.append("  ".join(f"{name} {value}" for name, value in figures["devices"].items()))
    lines += [f"model {model['name']}: {model['title']}, {model['megabytes']} MB" for model in figures["models"]]
    if not figures["models"]:
        lines.append("no embedded models")
    run = figures.get("run")
    if run:
        lines.append(f"task {run['task']}: {run['parameters']:,} parameters, {run['trainable']:,} trained")
        lines += [
            f"  {part['name']} ({part['class']}): {part['parameters']:,} parameters, {part['trainable']:,} trained"
            for part in run["parts"]
        ]
        lines.append(f"weights, gradients, AdamW and EMA in float32: {run['state_megabytes']} MB, activations extra")
    sys.stdout.write("\n".join(lines) + "\n")
