"""``layton info``: what is installed, what models are made of, and what a run will need."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from json import loads
from math import prod
from pathlib import Path
from typing import Any

from layton.assets import ASSETS, resolve
from layton.errors import UsageError
from layton.folder import write_json

_PACKAGES = ("layton", "torch", "torchvision", "lightning", "diffusers", "transformers", "peft", "webdataset")


def info(
    models: list[str] | None = None,
    *,
    config: list[str] | None = None,
    data: str | None = None,
    changes: list[str] | None = None,
    allow: list[str] | None = None,
    json: str | None = None,
) -> None:
    """Print versions, devices and what models are made of; with a run file, what the run will need.

    Args:
        models: names of embedded models, or folders that a run exported; all embedded ones by default, without a
            run file.
        config: run files as for `layton fit`, later ones over earlier ones; their task is built to count parameters.
        data: data file of the run; one training step is made on the CPU to count its computation and activations.
        changes: settings of the run file to change, as `layton fit` takes them, but without the dashes:
            model.init_args.pipeline=my_pipeline.
        allow: modules of your own that run files may name.
        json: write the figures to this file as well.
    """
    if (data is not None or changes) and not config:
        raise UsageError("--data and --changes are of a run: give its --config too")
    named = models if models or config else _embedded()
    figures: dict[str, Any] = {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "devices": _devices(),
        "models": [describe(resolve(name)) for name in named or ()],
    }
    if config:
        from layton.commands.run_needs import run_needs

        figures["run"] = run_needs(config, data=data, changes=changes or (), allow=allow or ())
    _print(figures)
    if json is not None:
        write_json(json, figures)


def _embedded() -> list[str]:
    return [path.name for path in sorted(ASSETS.glob("*")) if next(path.rglob("*.safetensors"), None) is not None]


def describe(folder: Path) -> dict[str, Any]:
    """What lies in a model's folder, from its settings and the headers of its weights.

    Returns:
        ``name``, ``folder``, ``megabytes``, ``card`` (a path, or None) and ``parts``, each with ``place`` in the
        folder, ``class``, ``parameters`` and the numbers of ``steps`` that it was trained for, if it was.

    Raises:
        ValueError: A file is damaged.
    """
    weights = sorted(folder.rglob("*.safetensors"))
    places = sorted({path.parent for path in weights})
    default = _settings(folder / "config.json").get("default_decoder")
    parts = [_part(folder, place, default) for place in places]
    card = folder / "README.md"
    return {
        "name": folder.name,
        "folder": str(folder),
        "megabytes": round(sum(file.stat().st_size for file in weights) / 1e6, 2),
        "card": str(card) if card.is_file() else None,
        "parts": parts,
    }


def _part(folder: Path, place: Path, default_decoder: Any) -> dict[str, Any]:
    settings, few = _settings(place / "config.json"), _settings(place / "few_step.json")
    times = few.get("times") or settings.get("sampling", {}).get("times")
    architectures = settings.get("architectures") or [None]
    kind = settings.get("class") or settings.get("_class_name") or architectures[0]
    return {
        "place": place.relative_to(folder).as_posix(),
        "class": str(kind).rpartition(".")[2] if kind else "LoRA" if few else "weights",
        "parameters": sum(_count(file) for file in place.glob("*.safetensors")),
        "steps": sorted(int(steps) for steps in times) if times else None,
        "default": place.parent.name == "decoders" and place.name == default_decoder,
    }


def _settings(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} cannot be read ({error})") from error
    return found if isinstance(found, dict) else {}


def _count(file: Path) -> int:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            return sum(prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} cannot be read ({error})") from error


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
    for model in figures["models"]:
        lines.append(f"{model['name']}: {model['megabytes']} MB of weights; its card is {model['card'] or 'missing'}")
        lines += [_part_line(part) for part in model["parts"]]
    run = figures.get("run")
    if not figures["models"] and not run:
        lines.append("no embedded models")
    if run:
        lines.append(f"task {run['task']}: {run['parameters']:,} parameters, {run['trainable']:,} trained")
        lines += [
            f"  {part['name']} ({part['class']}): {part['parameters']:,} parameters, {part['trainable']:,} trained"
            for part in run["parts"]
            if part["parameters"]
        ]
        lines.append(f"weights, gradients, AdamW and EMA in float32: {run['state_megabytes']} MB, activations extra")
        lines += _step_lines(run)
    sys.stdout.write("\n".join(lines) + "\n")


def _part_line(part: dict[str, Any]) -> str:
    steps, default = part["steps"], ", the default" * part["default"]
    trained = "" if steps is None else f"  steps {steps[0]}" + f" to {steps[-1]}" * (len(steps) > 1)
    return f"  {part['place']:<30}{part['class']:<22}{part['parameters']:>10,} parameters{trained}{default}"


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
