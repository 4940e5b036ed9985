"""Opening a diffusers pipeline folder as a teacher: local files, safetensors only, classes of a known list."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.utils import deprecation_utils
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from layton.assets import find_pipeline
from layton.modules import require_weights, variant_of

PIPELINES: tuple[type[DiffusionPipeline], ...] = (
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    StableDiffusion3Pipeline,
    FluxPipeline,
)
INDEX = "model_index.json"
# newer versions of diffusers renamed it
_DTYPE = "dtype" if hasattr(deprecation_utils, "_resolve_dtype") else "torch_dtype"
_LIBRARIES = ("diffusers", "transformers")
_OURS = ("layton.distillation.few_step_schedulers", "distill.stacked")  # what distilled students bring
_UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # judges and inputs that training has no use for


def open_pipeline(
    folder: str | Path, *, dtype: torch.dtype = torch.float32, text_only: bool = False
) -> DiffusionPipeline:
    """Read a pipeline folder: Stable Diffusion 1.x, 2.x, XL, 3, FLUX, or the embedded one by its name.

    A folder is data: classes named in it must be diffusers' and transformers' own, code lying in it is never run, and
    weights are read from safetensors only.

    Args:
        folder: What diffusers' ``save_pretrained`` wrote, or the name of an embedded model.
        dtype: Type of all weights but the autoencoder's, which are float32.
        text_only: Leave network and autoencoder without weights, on the meta device: for its prompts.

    Returns:
        The pipeline, frozen, in evaluation mode, on the CPU.

    Raises:
        UsageError: There is no such folder.
        ValueError: It holds no such pipeline, or a part is missing or damaged.
    """
    root = find_pipeline(folder)
    index = checked_index(root)
    kind = _pipeline_class(root, index)
    left_out = _left_out(index)
    if text_only:
        left_out |= _outlines(root, index)
    with _silent():
        pipe = load_parts(kind, root, left_out, dtype=dtype)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    return pipe


def open_outline(folder: str | Path) -> DiffusionPipeline:
    """The same pipeline without weights, for what its shape says: network and autoencoder on the meta device alone.

    Raises:
        UsageError: There is no such folder.
        ValueError: It holds no such pipeline, or its network's configuration cannot be read.
    """
    root = find_pipeline(folder)
    index = checked_index(root)
    kind = _pipeline_class(root, index)
    parts: dict[str, Any] = {key: None for key, value in index.items() if isinstance(value, list)}
    parts |= _left_out(index) | _outlines(root, index)
    return kind(**{key: value for key, value in parts.items() if key in inspect.signature(kind.__init__).parameters})


def _left_out(index: Mapping[str, Any]) -> dict[str, Any]:
    """What a pipeline is made without, and said to be, or diffusers warns of it."""
    left_out: dict[str, Any] = {key: None for key in _UNUSED if key in index}
    if "requires_safety_checker" in index:
        left_out["requires_safety_checker"] = False
    return left_out


def _outlines(root: Path, index: Mapping[str, Any]) -> dict[str, torch.nn.Module]:
    """Network and autoencoder of a folder on the meta device."""
    found = {}
    for name in ("unet" if "unet" in index else "transformer", "vae"):
        try:
            library, class_name = index[name]
            part = getattr(import_module(library), class_name)
            config = part.load_config(root / name, local_files_only=True)
        except (KeyError, TypeError, AttributeError, OSError) as error:
            raise ValueError(f"{root / name} cannot be read ({' '.join(str(error).split())})") from error
        with torch.device("meta"):
            found[name] = part.from_config(config)
    return found


def _pipeline_class(root: Path, index: Mapping[str, Any]) -> type[DiffusionPipeline]:
    classes = {kind.__name__: kind for kind in PIPELINES}
    name = index.get("_class_name")
    if not isinstance(name, str) or name not in classes:
        raise ValueError(f"{root} holds a {name!r}; it must be one of {', '.join(classes)}")
    return classes[name]


def load_parts(
    kind: type[DiffusionPipeline], root: Path, given: Mapping[str, Any], *, dtype: torch.dtype
) -> DiffusionPipeline:
    """``from_pretrained`` of a local folder: safetensors only, no weight missing, every part in the type asked for.

    Args:
        kind: diffusers' class; ``DiffusionPipeline`` takes what the folder names.
        root: The folder, whose index was checked (`checked_index`).
        given: Parts to put in place of the folder's.
        dtype: Type of all weights but the autoencoder's, which are float32. Else transformers would read its encoders
            in the type that their folders name.

    Raises:
        ValueError: A part is missing or damaged.
    """
    types = {"default": dtype, "vae": torch.float32}
    try:
        pipe: DiffusionPipeline = kind.from_pretrained(
            str(root),
            local_files_only=True,
            use_safetensors=True,
            variant=pipeline_variant(root),
            **{_DTYPE: types},
            **given,
        )
        for name, part in pipe.components.items():
            if isinstance(part, torch.nn.Module) and name not in given:
                require_weights(part, root / name)
    except OSError as error:  # what diffusers and transformers raise for a missing or unreadable part
        reason = " ".join(str(error).split())
        raise ValueError(f"{root}: a part of the pipeline cannot be read ({reason}){_pickled(root)}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _pickled(root: Path) -> str:
    """What to do about weights that are there, but not in safetensors."""
    parts = sorted({path.parent for path in root.glob("*/*.bin") if not any(path.parent.glob("*.safetensors"))})
    if not parts:
        return ""
    names = ", ".join(part.name for part in parts)
    return f". Weights of {names} are pickled (.bin), which is never read here: have diffusers save them as safetensors"


@contextmanager
def _silent() -> Iterator[None]:
    """Without progress bars of libraries, which diffusers shows again afterwards."""
    told = diffusers_logging.is_progress_bar_enabled()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if told:
            diffusers_logging.enable_progress_bar()


def pipeline_variant(root: Path) -> str | None:
    """What diffusers is to be asked for where a folder's network is stored as a variant alone (`variant_of`)."""
    return variant_of(root / "unet") or variant_of(root / "transformer")


def checked_index(root: Path) -> dict[str, Any]:
    """The table of a pipeline folder's parts, whose classes are known; what this library brings is imported.

    diffusers finds classes outside itself and transformers only in modules that are imported already.

    Raises:
        ValueError: There is no table, or a part is of another library.
    """
    index = _read_index(root)
    parts = {key: value for key, value in index.items() if isinstance(value, list) and key not in _UNUSED}
    libraries = {key: value[0] if value else None for key, value in parts.items()}
    foreign = {key: parts[key] for key, name in libraries.items() if name not in (*_LIBRARIES, *_OURS, None)}
    if foreign:
        raise ValueError(f"{root}: parts from other libraries than {' and '.join(_LIBRARIES)}: {foreign}")
    for name in sorted(set(_OURS) & set(libraries.values())):
        import_module(name)
    return index


def _read_index(root: Path) -> dict[str, Any]:
    try:
        index = json.loads((root / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{root / INDEX} cannot be read ({error})") from error
    if not isinstance(index, dict):
        raise ValueError(f"{root / INDEX} is no table of parts")
    return index
