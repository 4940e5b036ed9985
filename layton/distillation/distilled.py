"""What distillation gives, in diffusers' formats: a LoRA or a whole network, with its record ``few_step.json``.

The LoRA file has PEFT's key names and the adapter's configuration in its header: that is what
``pipeline.load_lora_weights`` reads back without loss. Other ways lose silently: the conversion of key names drops all
attention layers of the usual target list, and without the header alpha is guessed.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from diffusers import (
    DiffusionPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.loaders import (
    FluxLoraLoaderMixin,
    SD3LoraLoaderMixin,
    StableDiffusionLoraLoaderMixin,
)
from diffusers.utils import logging as diffusers_logging
from safetensors import safe_open
from torch import Tensor, nn

from distill.adapters import (
    AdapterView,
    active_adapters,
    adapter_state_dict,
    load_adapter_state_dict,
    set_active_adapters,
)
from distill.denoiser import Denoiser
from distill.few_step import FewStepSampling
from distill.low_rank import extend_rank
from distill.models import FlowTransformerDenoiser, UNetDenoiser
from distill.stacked import StackedUNet2DConditionModel
from layton.control import base_state_dict
from layton.distillation.few_step_schedulers import FlowMatchUNetScheduler, few_step_scheduler
from layton.folder import CONFIG_NAME, load_tensors, save_config, save_tensors, write_atomically, write_text
from layton.ldm.teacher import pipeline_variant

FEW_STEP_NAME = "few_step.json"
LORA_NAME = "pytorch_lora_weights.safetensors"
NETWORK_NAME = "diffusion_pytorch_model.safetensors"
_INDEX = "model_index.json"
_METADATA = "lora_adapter_metadata"

Network: TypeAlias = UNet2DConditionModel | SD3Transformer2DModel | FluxTransformer2DModel
_WRITERS = (
    (UNet2DConditionModel, "unet", StableDiffusionLoraLoaderMixin),
    (SD3Transformer2DModel, "transformer", SD3LoraLoaderMixin),
    (FluxTransformer2DModel, "transformer", FluxLoraLoaderMixin),
)


def save_distilled(
    student: Denoiser, folder: str | Path, sampling: FewStepSampling, *, dtype: torch.dtype | None = None
) -> None:
    """Write a distilled student: its adapter if it is a view with one, else its whole network.

    Args:
        student: ``networks.student`` of the training run.
        folder: Where to; made if needed.
        sampling: How it is to be sampled.
        dtype: Type of floating-point weights on disk; default their own.

    Raises:
        ValueError: The student wraps no diffusers UNet or transformer.
    """
    root = Path(folder)
    if isinstance(student, AdapterView) and student.names:
        save_lora(network_of(student.denoiser), root, name=student.names[-1], dtype=dtype)
    else:
        save_network(network_of(student), root, dtype=dtype)
    save_sampling(sampling, root)


def network_of(denoiser: Denoiser) -> Network:
    """The diffusers network inside a denoiser.

    Raises:
        ValueError: The denoiser is something else, or more.
    """
    inner = denoiser.denoiser if isinstance(denoiser, AdapterView) else denoiser
    # Layton's decoder has a UNet too, but is more than that, and is saved by itself.
    if isinstance(inner, UNetDenoiser):
        return inner.unet
    if isinstance(inner, FlowTransformerDenoiser):
        return inner.transformer
    raise ValueError(f"{type(inner).__name__} is no plain diffusers UNet or flow transformer")


def save_sampling(sampling: FewStepSampling, folder: str | Path) -> None:
    """Write ``few_step.json``."""
    write_text(Path(folder) / FEW_STEP_NAME, json.dumps(sampling.to_json(), indent=2) + "\n")


def load_sampling(folder: str | Path) -> FewStepSampling:
    """Read ``few_step.json``.

    Raises:
        ValueError: It is missing or malformed.
    """
    path = Path(folder) / FEW_STEP_NAME
    if not path.is_file():
        raise ValueError(f"{folder} holds no {FEW_STEP_NAME}: not a distilled student")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
        return FewStepSampling.from_json(values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def save_lora(network: Network, folder: str | Path, *, name: str = "default", dtype: torch.dtype | None = None) -> None:
    """Write one adapter of a network so that ``pipeline.load_lora_weights`` reads exactly it.

    Args:
        network: UNet or transformer with the adapter.
        folder: Where to; the file is ``pytorch_lora_weights.safetensors``.
        name: The adapter; the name is not saved.
        dtype: Type on disk, default the weights' own.

    Raises:
        ValueError: The network has no such adapter.
    """
    state = {key: value.detach().to("cpu", dtype).clone() for key, value in adapter_state_dict(network, name).items()}
    metadata = json.loads(json.dumps(network.peft_config[name].to_dict(), default=list))
    part, mixin = next((part, mixin) for kind, part, mixin in _WRITERS if isinstance(network, kind))
    _write_lora(state, metadata, Path(folder), part, mixin)


def save_lora_tensors(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    folder: str | Path,
    *,
    part: Literal["unet", "transformer"],
) -> None:
    """Write a LoRA of which only the tensors are at hand, as `save_lora` does.

    Args:
        tensors: By PEFT's names, which begin with the network's layers.
        config: Of its ``LoraConfig``.
        folder: Where to.
        part: What it adapts in the pipeline.
    """
    metadata = json.loads(json.dumps(dict(config), default=list))
    mixin = StableDiffusionLoraLoaderMixin if part == "unet" else FluxLoraLoaderMixin
    _write_lora(dict(tensors), metadata, Path(folder), part, mixin)


def _write_lora(state: dict[str, Tensor], metadata: dict[str, Any], folder: Path, name: str, mixin: Any) -> None:
    layers: dict[str, Any] = {f"{name}_lora_layers": state, f"{name}_lora_adapter_metadata": metadata}

    def write(part: Path) -> None:
        mixin.save_lora_weights(part.parent, weight_name=part.name, **layers)

    write_atomically(folder / LORA_NAME, write)


def save_network(network: Network, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Write the whole network so that its class's ``from_pretrained`` reads it; adapters are left out."""
    save_tensors(Path(folder) / NETWORK_NAME, base_state_dict(network), dtype=dtype)
    save_config(Path(folder), json.loads(network.to_json_string()))


def begin_with(student: Denoiser, folder: str | Path) -> None:
    """Give an untrained student the weights of one that was saved.

    Args:
        student: Of an adapter whose rank is at least the saved one's, or of a whole network; changed in place.
        folder: What `save_distilled` wrote of a student of the same kind.

    Raises:
        ValueError: The folder holds no student of this kind, or its layers differ.
    """
    root = Path(folder)
    file = LORA_NAME if isinstance(student, AdapterView) and student.names else NETWORK_NAME
    if not (root / file).is_file():
        raise ValueError(f"{folder} holds no {file}, which this student could begin with")
    tensors, network = load_tensors(root / file), network_of(student)
    try:
        if isinstance(student, AdapterView) and student.names:
            _begin_adapter(network, student.names[-1], tensors, root / file)
        else:
            network.load_state_dict(tensors)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"the student cannot begin with {root / file}: {error}") from error


def _begin_adapter(network: Network, name: str, tensors: dict[str, Tensor], path: Path) -> None:
    part, saved = lora_config(path)
    state = {key.removeprefix(f"{part}."): value for key, value in tensors.items()}
    config = network.peft_config[name]
    scale = (saved["lora_alpha"] / saved["r"]) / (config.lora_alpha / config.r)
    load_adapter_state_dict(network, extend_rank(state, adapter_state_dict(network, name), scale), name)


def lora_config(path: Path) -> tuple[str, dict[str, Any]]:
    """What a LoRA file adapts, ``unet`` or ``transformer``, and its ``LoraConfig`` of one rank and scale.

    Raises:
        ValueError: The file does not say how the LoRA is scaled, or has more than one rank or scale.
    """
    with safe_open(path, framework="pt") as file:
        metadata = json.loads((file.metadata() or {}).get(_METADATA, "{}"))
        part = next(iter(file.keys())).partition(".")[0]
    config = {name.removeprefix(f"{part}."): value for name, value in metadata.items()}
    if "r" not in config or "lora_alpha" not in config:
        raise ValueError(f"{path} does not say its rank and alpha: it was not written by layton or diffusers")
    if odd := [name for name in ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora") if config.get(name)]:
        raise ValueError(f"{path}: a LoRA with {', '.join(odd)} has no one rank and scale")
    return part, config


def student_pipeline(teacher: Path, export: Path, folder: Path) -> Path:
    """A pipeline folder like the teacher's with a student in place of its network: the teacher of a next student.

    A student that became a flow gets a flow scheduler, by which it is known for one. Weights that stay the same are
    hard links where the disk allows it, so that they take no space twice; all else is copied.

    Args:
        teacher: Diffusers pipeline folder.
        export: What `save_distilled` wrote of a whole network.
        folder: Where to; left alone when it is there already.

    Returns:
        The folder.

    Raises:
        ValueError: The export holds no whole network.
    """
    if (folder / _INDEX).is_file():
        return folder
    if not (export / NETWORK_NAME).is_file():
        raise ValueError(f"{export} holds no whole network: only such a student can be a teacher")
    name = "unet" if (teacher / "unet").is_dir() else "transformer"
    part = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.part")
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        index = json.loads((teacher / _INDEX).read_text(encoding="utf-8"))
        part.mkdir()
        shutil.copyfile(teacher / _INDEX, part / _INDEX)
        for own in sorted(index.keys() - {name}):
            if (teacher / own).is_dir():
                shutil.copytree(teacher / own, part / own, copy_function=_link)
        (part / name).mkdir()
        # diffusers looks for one variant in all parts, or for none
        variant = pipeline_variant(teacher)
        network = NETWORK_NAME if variant is None else NETWORK_NAME.replace(".safetensors", f".{variant}.safetensors")
        for file, target in ((CONFIG_NAME, CONFIG_NAME), (NETWORK_NAME, network)):
            _link(str(export / file), str(part / name / target))
        shutil.copyfile(export / FEW_STEP_NAME, part / FEW_STEP_NAME)
        if load_sampling(export).prediction == "flow":
            _be_flow(part)
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _be_flow(folder: Path) -> None:
    """Give a pipeline folder a flow scheduler, if it has none with a shift of its own."""
    index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    if "FlowMatch" in str(index["scheduler"]):
        return
    scheduler = FlowMatchUNetScheduler()
    for file in (folder / "scheduler").iterdir():
        file.unlink()  # a link to the teacher's
    scheduler.save_pretrained(folder / "scheduler")
    index["scheduler"] = [type(scheduler).__module__, type(scheduler).__name__]
    (folder / _INDEX).unlink()
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _link(source: str, target: str) -> None:
    """A hard link of weights; whoever edits a small file shall not edit the teacher's."""
    if not source.endswith(".safetensors"):
        shutil.copyfile(source, target)
        return
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copyfile(source, target)


def load_distilled(
    pipeline: DiffusionPipeline, folder: str | Path, *, adapter_name: str = "distilled"
) -> FewStepSampling:
    """Put a distilled student into a pipeline, with a scheduler that takes its times and refuses others.

    Call the pipeline with ``**pipeline_arguments(sampling, num_steps)`` afterwards. A LoRA joins those already loaded
    and is switched on beside them, but takes the place of one of its own name; scale it, or switch between several,
    with ``pipeline.set_adapters`` or ``cross_attention_kwargs``.

    Args:
        pipeline: A pipeline with the teacher's UNet or transformer; changed in place.
        folder: What ``save_distilled`` wrote.
        adapter_name: Name for the LoRA in the pipeline.

    Returns:
        How the student is to be sampled.

    Raises:
        ValueError: Files are missing, or the LoRA does not fit the pipeline's network in every key.
    """
    root = Path(folder)
    sampling = load_sampling(root)
    part = "unet" if getattr(pipeline, "unet", None) is not None else "transformer"
    scheduler = few_step_scheduler(sampling, pipeline.scheduler.config)
    if (root / LORA_NAME).is_file():
        _load_lora(pipeline, root / LORA_NAME, part, adapter_name)
    elif (root / CONFIG_NAME).is_file() and (root / NETWORK_NAME).is_file():
        old = getattr(pipeline, part)
        named = json.loads((root / CONFIG_NAME).read_text(encoding="utf-8")).get("_class_name")
        kind: Any = type(old)
        for other in (StackedUNet2DConditionModel, UNet2DConditionModel):
            kind = other if named == other.__name__ else kind
        network = kind.from_pretrained(root, local_files_only=True, use_safetensors=True, torch_dtype=old.dtype)
        pipeline.register_modules(**{part: network.to(old.device)})
    else:
        raise ValueError(f"{root} holds neither {LORA_NAME} nor {CONFIG_NAME} with {NETWORK_NAME}")
    pipeline.register_modules(scheduler=scheduler)
    return sampling


def pipeline_arguments(sampling: FewStepSampling, num_steps: int) -> dict[str, Any]:
    """Arguments for a pipeline's call: number of steps, guidance, and TCD's noise.

    Guidance is in the weights, so the pipeline's own is off; a student with a guidance input gets its trained scale.

    Raises:
        ValueError: The student was not trained for this number of steps.
    """
    sampling.times_for(num_steps)
    arguments: dict[str, Any] = {"num_inference_steps": num_steps}
    arguments["guidance_scale"] = 1.0 if sampling.guidance is None else sampling.guidance
    if sampling.prediction != "flow" and sampling.kind != "renoise":
        arguments["eta"] = sampling.gamma if sampling.kind == "tcd" else 0.0
    return arguments


def _load_lora(pipeline: DiffusionPipeline, path: Path, part: str, adapter_name: str) -> None:
    network: nn.Module = getattr(pipeline, part)
    saved = {
        key.removeprefix(part + "."): value for key, value in load_tensors(path).items() if key.startswith(part + ".")
    }
    _check_layers(network, saved, path)
    if any(adapter_name in getattr(module, "merged_adapters", ()) for module in network.modules()):
        raise ValueError(f"{adapter_name!r} is fused into the network's weights: pipeline.unfuse_lora() takes it out")
    if adapter_name in getattr(network, "peft_config", {}):
        pipeline.delete_adapters(adapter_name)
    before = active_adapters(network)
    with warnings.catch_warnings():
        # peft warns of a second adapter, which is what is wanted here.
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        with _quiet():  # it warns of text encoders without a LoRA
            pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=adapter_name)
    loaded = adapter_state_dict(network, adapter_name)
    wrong = sorted(saved.keys() ^ loaded.keys()) + [
        key
        for key in saved.keys() & loaded.keys()
        if not torch.equal(loaded[key].cpu(), saved[key].to(loaded[key].dtype))
    ]
    if wrong:
        raise ValueError(f"{len(wrong)} of {len(saved)} LoRA tensors in {path} did not arrive, first {wrong[:5]}")
    # The pipeline's own set_adapters would put the scales of the others back to 1.
    set_active_adapters(network, (*before, adapter_name))


@contextmanager
def _quiet() -> Iterator[None]:
    """Diffusers says no more than errors."""
    before = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(before)


def _check_layers(network: nn.Module, saved: dict[str, Tensor], path: Path) -> None:
    layers = {name.removesuffix(".base_layer") for name, _ in network.named_modules()}
    wanted = {key.rsplit(".lora_", 1)[0] for key in saved}
    if not wanted & layers:
        raise ValueError(f"no key of {path} matches a layer of {type(network).__name__}")
    if unknown := sorted(wanted - layers):
        raise ValueError(f"{path} has {len(unknown)} layers that {type(network).__name__} has not, first {unknown[:5]}")
