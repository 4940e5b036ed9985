"""TLCM's released LoRAs (arXiv 2406.05768, github.com/OPPO-Mente-Lab/TLCM), folders of peft, as distilled students.

The folders hold ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``), and are meant for
``peft.get_peft_model``: diffusers cannot load them, and nothing in them says at which times they are to be sampled.
What comes out is what `layton.distillation.distilled.load_distilled` reads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from peft import LoraConfig
from torch import Tensor

from distill.few_step import FewStepSampling
from distill.methods.segments import INFERENCE_INDICES, inference_times
from distill.schedules import VPSchedule
from layton.convert.checkpoint import ConvertError, read_checkpoint
from layton.distillation.distilled import save_lora_tensors, save_sampling

FLUX_GUIDANCE = 7.0  # the README's
FLUX_SHIFT = math.exp(1.15)  # FLUX dev's for 1024 pixels; its pipeline shifts its even times so
_UNET_TOP = ("conv_in.", "conv_out.", "time_embedding.", "add_embedding.")
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
_READ = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora")
_NOT_READ = (
    "use_dora", "fan_in_fan_out", "modules_to_save", "layers_to_transform", "lora_bias", "exclude_modules",
    "target_parameters",
)  # fmt: skip
_CHANGE_THE_BASE = (
    "pissa",
    "olora",
    "loftq",
    "corda",
    "eva",
)  # as ways to initialise: the rest of the weights moves too

Part = Literal["unet", "transformer"]


def convert_tlcm(source: Path, folder: Path) -> FewStepSampling:
    """Write a released LoRA as a distilled student: the LoRA in diffusers' format and ``few_step.json``.

    Args:
        source: Folder of peft.
        folder: Where to.

    Returns:
        How the student is sampled: for UNets the times of TLCM's ``inference.py``, without guidance; for FLUX even
        times shifted as for 1024 pixels, and an embedded guidance of 7.

    Raises:
        ConvertError: Something is missing, damaged, or no plain LoRA.
    """
    config = read_config(source)
    tensors = read_adapter(source)
    part = part_of(tensors, source)
    sampling = flux_sampling() if part == "transformer" else unet_sampling()
    save_lora_tensors(tensors, config.to_dict(), folder, part=part)
    save_sampling(sampling, folder)
    return sampling


def part_of(tensors: Mapping[str, Tensor], source: Path) -> Part:
    """What the layers' names are of: a UNet or FLUX's transformer.

    Raises:
        ConvertError: Neither.
    """
    if all(name.startswith(("down_blocks.", "mid_block.", "up_blocks.", *_UNET_TOP)) for name in tensors):
        return "unet"
    if any(name.startswith("single_transformer_blocks.") for name in tensors):
        return "transformer"
    raise ConvertError(source, [f"neither a UNet's layers nor FLUX's, for instance {next(iter(tensors))}"])


def read_config(source: Path) -> LoraConfig:
    """The adapter's shape.

    Raises:
        ConvertError: No such file, or it asks for more than a LoRA.
    """
    path = source / "adapter_config.json"
    if not path.is_file():
        raise ConvertError(source, ["no adapter_config.json: not a folder of peft"])
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConvertError(path, [f"not JSON: {error}"]) from error
    if not isinstance(values, Mapping) or values.get("peft_type") != "LORA":
        raise ConvertError(path, ["not the configuration of a LoRA"])
    asked = [f"{name} = {values[name]!r} is not supported" for name in _NOT_READ if values.get(name)]
    if values.get("bias", "none") != "none":
        asked.append(f"bias = {values['bias']!r} is not supported")
    way = str(values.get("init_lora_weights", True)).lower()
    if way.startswith(_CHANGE_THE_BASE):
        asked.append(f"init_lora_weights = {way!r} changes the base model's weights too")
    missing = [f"no {name}" for name in ("r", "target_modules") if not values.get(name)]
    if asked or missing:
        raise ConvertError(path, [*asked, *missing])
    return LoraConfig(**{name: values[name] for name in _READ if values.get(name) is not None})


def read_adapter(source: Path) -> dict[str, Tensor]:
    """Its tensors by the names of the network's layers: ``down_blocks.0...to_q.lora_A.weight`` and so on.

    Raises:
        ConvertError: No weights, or names of another kind.
    """
    files = [source / name for name in _WEIGHTS if (source / name).is_file()]
    if not files:
        raise ConvertError(source, [f"no weights: neither {' nor '.join(_WEIGHTS)}"])
    tensors = {name.removeprefix(_PREFIX): value for name, value in read_checkpoint(files[0]).items()}
    odd = [name for name in tensors if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    halves = {name.rsplit(".lora_", 1)[0]: name for name in tensors}
    odd += [
        f"{layer} has one half of a LoRA only"
        for layer in halves
        if not {f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"} <= tensors.keys()
    ]
    if odd or not tensors:
        raise ConvertError(files[0], odd or ["it holds no tensors"])
    return tensors


def unet_sampling() -> FewStepSampling:
    """1 to 8 steps at the published times, with fresh noise between them."""
    times = tuple(tuple(inference_times(VPSchedule(), count).tolist()) for count in INFERENCE_INDICES)
    return FewStepSampling(times=times)


def flux_sampling() -> FewStepSampling:
    """1 to 8 even steps as FLUX's pipeline takes them for 1024 pixels, with fresh noise between them."""

    def shifted(share: float) -> float:
        return 1000.0 * FLUX_SHIFT * share / (1.0 + (FLUX_SHIFT - 1.0) * share)

    times = tuple(tuple(shifted(1.0 - i / count) for i in range(count)) for count in INFERENCE_INDICES)
    return FewStepSampling(times=times, guidance=FLUX_GUIDANCE, prediction="flow")
