"""``layton info``: what is installed, what is embedded, and what a run will need."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from layton.errors import UsageError
from layton.reports import write_json

_PACKAGES = ("layton", "torch", "torchvision", "lightning", "diffusers", "transformers", "peft", "webdataset")
_ASSETS = Path(__file__).resolve().parent.parent / "assets"


def info(
    *,
    config: list[str] | None = None,
    data: str | None = None,
    allow: list[str] | None = None,
    json: str | None = None,
) -> None:
    """Print versions, devices and the embedded models with their cards; with a run file, what the run will need.

    Args:
        config: run files as for `layton fit`, later ones over earlier ones; their task is built to count parameters.
        data: data file of the run; one training step is made on the CPU to count its computation and activations.
        allow: modules of your own that run files may name.
        json: write the figures to this file as well.
    """
    figures: dict[str, Any] = {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "devices": _devices(),
        "models": embedded_models(_ASSETS),
    }
    if data is not None and not config:
        raise UsageError("--data says what a run learns from: give the run's --config too")
    if config:
        from layton.commands.run_needs import run_needs

        figures["run"] = run_needs(config, data=data, allow=allow or ())
    _print(figures)
    if json is not None:
        write_json(json, figures)


def embedded_models(folder: Path) -> list[dict[str, Any]]:
    """Models shipped in a folder: name, megabytes, path of the card and its first line of text."""
    models = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        weights = sorted(path.rglob("*.safetensors")) if path.is_dir() else []
        if weights:
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
        lines += _step_lines(run)
    sys.stdout.write("\n".join(lines) + "\n")


def _step_lines(run: dict[str, Any]) -> list[str]:
    step = run.get("step")
    if step is None:
        return ["computation and activations: name the run's --data too"]
    lines = [
        f"one training step of a rank: {step['teraflops']:.4g} teraFLOP, {step['activations_megabytes']:.1f} MB of "
        "activations in float32"
    ]
    if run["total_teraflops"] is not None:
        lines.append(f"all {run['steps']:,} steps: {run['total_teraflops']:.4g} teraFLOP a rank")
    return lines
