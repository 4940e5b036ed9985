"""Decoders that stay as they are while the diffusion model that they decode with goes on learning.

Text-to-image that learns by adaptors on its UNet (`layton.tasks.text_to_image.TextToImageTask`, ``lora``) exports them
folded into the UNet and once more beside it. A stage-1 decoder has adaptors of its own on that UNet; given the other
ones as well, with the sign turned round, it takes them out again: ``W + B A + (B_d A_d - B A) = W + B_d A_d``. What was
distilled from it stays, too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from distill.adapters import LoraSettings
from layton.control import load_unet
from layton.decoders.difference import fingerprints
from layton.distillation.distilled import LORA_NAME
from layton.folder import WEIGHTS_NAME, load_config, load_tensors, save_config, save_tensors
from layton.ladd import CLASS_NAME, LADD

_ROUNDING = 2**-9  # of the largest weight: old, new and adaptors may each have been stored in half precision


def rebase_decoder(folder: Path, adaptors: Path, *, rounding: torch.dtype | None = None) -> None:
    """Change a stage-1 decoder, in place, so that it belongs to a UNet into which adaptors were folded.

    Args:
        folder: What `LADD.save_pretrained` wrote; it has a LoRA.
        adaptors: Folder of a LoRA as diffusers reads it, on the same layers.
        rounding: Type that its factors are rounded to, the one they are to be stored in.

    Raises:
        ValueError: If the layers differ, or the decoder has no LoRA.
    """
    config = load_config(folder, expected_class=CLASS_NAME)
    if config["lora"] is None:
        raise ValueError(f"{folder} has no LoRA that could take other adaptors out")
    own = LoraSettings.from_json(config["lora"])  # type: ignore[arg-type]
    state = load_tensors(folder / WEIGHTS_NAME)
    other, settings = read_adaptors(adaptors)
    layers = {name.removeprefix("lora.").rpartition(".lora_")[0] for name in state if name.startswith("lora.")}
    found = {name.rpartition(".lora_")[0] for name in other}
    if layers != found:
        raise ValueError(f"{folder} and {adaptors} adapt other layers: {sorted(layers ^ found)[:5]}")
    for layer in sorted(layers):
        down, up = (f"lora.{layer}.lora_{half}.weight" for half in "AB")
        down_other, up_other = (other[f"{layer}.lora_{half}.weight"].to(rounding) for half in "AB")
        state[down] = torch.cat([state[down].float(), down_other.float()], dim=0)
        scaled = state[up].float() * (own.alpha / own.rank), -up_other.float() * (settings.alpha / settings.rank)
        state[up] = torch.cat(scaled, dim=1)
    rank = own.rank + settings.rank
    config["lora"] = LoraSettings(rank=rank, alpha=float(rank), targets=own.targets).to_json()
    save_tensors(folder / WEIGHTS_NAME, state, dtype=rounding)
    save_config(folder, config)


def rename_base(folder: Path, network: LADD) -> None:
    """Tell a decoder that holds a difference which network it is from now on the difference from, in place."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["difference"]["fingerprints"] |= {part: list(found) for part, found in fingerprints(network).items()}
    save_config(folder, config)


def rebase_all(decoders: Path, old: Path, pipeline: Path, *, rounding: torch.dtype | None = None) -> None:
    """Change the decoders of a tokenizer folder, in place, so that they belong to an export of text-to-image.

    Args:
        decoders: Folder ``decoders`` of a tokenizer, with one called ``diffusion``.
        old: Folder of the UNet that they decode with so far.
        pipeline: The export, with ``unet`` and ``lora``.
        rounding: See `rebase_decoder`.

    Raises:
        ValueError: If they do not fit each other, or the export began with another UNet; nothing is changed then.
    """
    require_grown_from(old, pipeline)
    base = decoders / "diffusion"
    rebase_decoder(base, pipeline / "lora", rounding=rounding)
    unet = load_unet(pipeline / "unet")
    network = LADD.from_pretrained(base, unet=unet.to(rounding).float())
    for config in sorted(decoders.glob("*/config.json")):
        if json.loads(config.read_text(encoding="utf-8")).get("difference"):
            rename_base(config.parent, network)


def require_grown_from(old: Path, pipeline: Path) -> None:
    """Stop unless an export's UNet is an old one plus its adaptors, up to the rounding of stored weights.

    Args:
        old: Folder of the old UNet.
        pipeline: The export, with ``unet`` and ``lora``.

    Raises:
        ValueError: Names the first tensor that is not.
    """
    before, after = (load_unet(folder).float().state_dict() for folder in (old, pipeline / "unet"))
    adaptors, shape = read_adaptors(pipeline / "lora")
    if before.keys() != after.keys():
        raise ValueError(
            f"{pipeline} did not begin with {old}: other tensors {sorted(before.keys() ^ after.keys())[:5]}"
        )
    for name, weight in before.items():
        wanted, layer = weight, name.removesuffix(".weight")
        if f"{layer}.lora_A.weight" in adaptors:
            down, up = (adaptors[f"{layer}.lora_{half}.weight"].float().flatten(1) for half in "AB")
            wanted = weight + (up @ down).view_as(weight) * (shape.alpha / shape.rank)
        if (after[name] - wanted).abs().max() > _ROUNDING * max(float(wanted.abs().max()), float(weight.abs().max())):
            raise ValueError(f"{pipeline} did not begin with {old}: {name} differs by more than its adaptors")


def read_adaptors(folder: Path) -> tuple[dict[str, Tensor], LoraSettings]:
    """A UNet's LoRA as `layton.distillation.distilled.save_lora` wrote it: factors by layer, and its shape.

    Raises:
        ValueError: If there is none, or it does not say its shape.
    """
    path = folder / LORA_NAME
    state = load_tensors(path)
    with safe_open(path, framework="pt") as file:
        metadata: Mapping[str, str] = file.metadata() or {}
    config: dict[str, Any] = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    try:
        shape = LoraSettings(
            rank=config["unet.r"], alpha=float(config["unet.lora_alpha"]), targets=tuple(config["unet.target_modules"])
        )
    except KeyError as error:
        raise ValueError(f"{path} does not say its {error}") from error
    return {name.removeprefix("unet."): value for name, value in state.items()}, shape
