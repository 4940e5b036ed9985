"""``layton convert``: released checkpoints into tokenizer folders."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from layton.commands import COMMANDS
from layton.errors import UsageError
from layton.options import refuse_given, require_least
from layton.staging import require_absent

if TYPE_CHECKING:
    import torch

    from layton.convert import ConvertedParts
    from layton.tokenizer import LaytonTokenizer

Kind = Literal["auto", "layton", "llamagen", "gpt"]
Precision = Literal["float32", "float16", "bfloat16"]
_IMAGE_SIZE, _OUTPUT_SIZE = 256, 1024


@dataclass(frozen=True, slots=True)
class LdmSettings:
    """What a released tokenizer file does not say about its latent diffusion model.

    Attributes:
        vae: Folder of a diffusers AutoencoderKL, for files without one.
        configs: ``unet``, ``vae`` and ``scheduler``: diffusers configurations in place of SDXL's.
    """

    vae: Path | None = None
    configs: Mapping[str, dict[str, Any]] = field(default_factory=dict)


def convert(
    checkpoint: Path,
    *,
    out: Path,
    kind: Kind = "auto",
    lora: Literal["keep", "merge"] | None = None,
    dtype: Precision = "float32",
    image_size: int | None = None,
    output_size: int | None = None,
    vae: Path | None = None,
    unet_config: Path | None = None,
    vae_config: Path | None = None,
    scheduler_config: Path | None = None,
    ignore: list[str] | None = None,
) -> int:
    """Convert a released tokenizer checkpoint into a folder that `LaytonTokenizer.from_pretrained` loads.

    Every tensor of the file must be known, and every tensor needed must be there with its shape; else nothing is
    written and the first problems are listed. The released LaCTok decoder becomes the decoder "consistency".

    Args:
        checkpoint: a .pth, .pt or .safetensors file; nothing in it is executed.
        out: folder to write; must not exist.
        kind: layton (the released LaCTok tokenizer), llamagen (VQ-16 or VQ-8), gpt (LaCTokGen-T or LlamaGen GPT, as
            `layton convert gpt` does), or auto to see from the tensors.
        lora: keep the decoder's adaptors apart (by default), or merge them into the UNet.
        dtype: of the weights on disk; codes stay float32.
        image_size: side in pixels of the encoder's input; 256 by default.
        output_size: side in pixels of the LaCTok decoder's output; 1024 by default.
        vae: folder of the diffusers AutoencoderKL, if the checkpoint holds none.
        unet_config: a diffusers UNet's config.json, if the decoder's is not that of SDXL.
        vae_config: a diffusers AutoencoderKL's config.json, if the one in the file is not that of SDXL.
        scheduler_config: a diffusers scheduler's configuration, if it is not SDXL's.
        ignore: names of tensors, or prefixes that end in a dot, that are left out of the check.
    """
    from layton.convert import ConvertError
    from layton.staging import staged

    require_least(1, {"image_size": image_size, "output_size": output_size})
    require_absent(out)
    layton_only = {"lora": lora, "output_size": output_size, "vae": vae, "unet_config": unet_config}
    layton_only |= {"vae_config": vae_config, "scheduler_config": scheduler_config}
    files = {"unet": unet_config, "vae": vae_config, "scheduler": scheduler_config}
    settings = LdmSettings(vae, {name: _read_config(path) for name, path in files.items() if path is not None})
    try:
        found = _kind(checkpoint, kind)
        if found != "layton":
            refuse_given(layton_only, "of LaCTok tokenizers, and this is none")
        if found == "gpt":
            refuse_given({"image_size": image_size, "ignore": ignore}, "of tokenizers, and this is a GPT")
            return _convert_gpt(checkpoint, out=out, dtype=dtype)
        with staged(out) as folder:
            if found == "llamagen":
                size = image_size or _IMAGE_SIZE
                lines = convert_llamagen(checkpoint, folder, dtype=_dtype(dtype), image_size=size, ignore=ignore or [])
            else:
                kept = lora or "keep"
                parts = read_released(checkpoint, settings, lora=kept, dtype=_dtype(dtype), ignore=ignore or [])
                sides = (image_size or _IMAGE_SIZE, output_size or _OUTPUT_SIZE)
                write_released(parts, folder, settings, image_size=sides[0], output_size=sides[1])
                lines = [f"{len(parts.unused)} tensors of the file are not needed"]
    except ConvertError as error:
        sys.stderr.write(f"layton: {error.told()}\n")
        return 1
    sys.stdout.write("\n".join([*lines, str(out)]) + "\n")
    return 0


def convert_lora(adapter: Path, *, out: Path) -> int:
    """Convert a released LoRA of TLCM, a folder of peft, into a distilled student for diffusers' pipelines.

    `load_distilled(pipeline, OUT)` puts it into SDXL's or FLUX's pipeline with the steps that it was trained for;
    `pipeline.load_lora_weights(OUT)` alone works too.

    Args:
        adapter: folder with adapter_config.json and the adapter's weights; nothing in it is executed.
        out: folder to write; must not exist.
    """
    from layton.convert import ConvertError
    from layton.convert.tlcm import convert_tlcm
    from layton.staging import staged

    require_absent(out)
    try:
        with staged(out) as folder:
            sampling = convert_tlcm(adapter, folder)
    except ConvertError as error:
        sys.stderr.write(f"layton: {error.told()}\n")
        return 1
    steps, guidance = sampling.step_counts, sampling.guidance or 1.0
    sys.stdout.write(f"{out}: for {min(steps)} to {max(steps)} steps, guidance {guidance:g}\n")
    return 0


def convert_llamagen(
    checkpoint: Path, folder: Path, *, dtype: torch.dtype, image_size: int, ignore: list[str]
) -> list[str]:
    """Write a LlamaGen VQ checkpoint as a tokenizer folder with the decoder "vqgan"; returns lines to print.

    Raises:
        ConvertError: If the file does not fit.
    """
    from layton.convert import convert_vqgan
    from layton.tokenizer import LaytonTokenizer
    from layton.vqgan_decoder import VQGANCodeDecoder

    parts = convert_vqgan(checkpoint, ignore=ignore, dtype=dtype)
    decoder = VQGANCodeDecoder(**parts.encoder.config)  # type: ignore[arg-type]  # the same arguments, as JSON values
    decoder.network = parts.decoder
    model = LaytonTokenizer(parts.encoder, parts.quantizer, {"vqgan": decoder}, image_size=image_size)
    model.save_pretrained(folder, dtype=dtype)
    return [f"{model.num_tokens} tokens of {model.vocab_size} codes for {image_size} pixels"]


def read_released(
    checkpoint: Path, settings: LdmSettings, *, lora: Literal["keep", "merge"], dtype: torch.dtype, ignore: list[str]
) -> ConvertedParts:
    """The parts of a released LaCTok file, with an autoencoder from the file or from the settings.

    Raises:
        ConvertError: If the file does not fit, or there is no autoencoder.
    """
    import dataclasses

    from layton.convert import ConvertError, convert_tokenizer, read_checkpoint
    from layton.convert.released import SDXL_SCHEDULER, SDXL_UNET, SDXL_VAE
    from layton.ldm.autoencoder import Autoencoder

    inside = any(name.startswith("vae.") for name in read_checkpoint(checkpoint))
    if not inside and settings.vae is None:
        raise ConvertError(checkpoint, ["it holds no autoencoder (vae.*): give the folder of one as --vae"])
    parts = convert_tokenizer(
        checkpoint,
        lora=lora,
        unet_config=settings.configs.get("unet", SDXL_UNET),
        vae_config=settings.configs.get("vae", SDXL_VAE) if inside and settings.vae is None else None,
        scheduler_config=settings.configs.get("scheduler", SDXL_SCHEDULER),
        ignore=[*ignore, "vae."] if inside and settings.vae is not None else ignore,
        dtype=dtype,
    )
    if settings.vae is not None:
        parts = dataclasses.replace(parts, vae=Autoencoder.from_pretrained(settings.vae).model.to(dtype))
    return parts


def write_released(
    parts: ConvertedParts, folder: Path, settings: LdmSettings, *, image_size: int, output_size: int
) -> LaytonTokenizer:
    """Write the parts as a tokenizer folder with its latent diffusion model in ``ldm/``.

    Raises:
        ValueError: If the sizes do not fit each other.
    """
    from diffusers import DDIMScheduler

    from layton.control import save_unet
    from layton.convert.released import SDXL_SCHEDULER
    from layton.decoders import ConsistencyDecoder
    from layton.decoders.consistency import sampling_at
    from layton.ldm.autoencoder import Autoencoder
    from layton.tokenizer import LDM_FOLDER, LaytonTokenizer

    autoencoder = Autoencoder(parts.vae)
    tokens = image_size // parts.encoder.downsample_factor
    latents, rest = divmod(output_size, autoencoder.downsample_factor)
    if rest or latents < 1 or tokens < 1:
        raise ValueError(
            f"an output of {output_size} pixels is no whole number of latents ({autoencoder.downsample_factor} pixels "
            f"each), or {image_size} pixels give no token"
        )
    times = {steps: parts.timesteps[:steps] for steps in range(1, len(parts.timesteps) + 1)}
    sampling = sampling_at(times, parts.decoder)
    decoder = ConsistencyDecoder(parts.decoder, autoencoder, sampling=sampling, latents_per_token=latents / tokens)
    model = LaytonTokenizer(parts.encoder, parts.quantizer, {"consistency": decoder}, image_size=image_size)
    model.save_pretrained(folder)
    ldm = folder / LDM_FOLDER
    save_unet(parts.decoder.unet, ldm / "unet")
    autoencoder.model.save_pretrained(str(ldm / "vae"), safe_serialization=True)
    noise = {"clip_sample": False, "steps_offset": 1, **settings.configs.get("scheduler", SDXL_SCHEDULER)}
    DDIMScheduler.from_config(noise).save_pretrained(str(ldm / "scheduler"))
    return model


def _kind(checkpoint: Path, kind: Kind) -> Kind:
    from layton.convert import ConvertError, read_checkpoint

    if kind != "auto":
        return kind
    names = read_checkpoint(checkpoint)
    if any(name.startswith(("decoder.controlnet.", "decoder.unet.")) for name in names):
        return "layton"
    if any(name.startswith("quantize.") for name in names):
        return "llamagen"
    if names.keys() >= {"tok_embeddings.weight", "output.weight"}:
        return "gpt"
    known = "a LaCTok tokenizer (decoder.unet.*), a LlamaGen VQ tokenizer (quantize.*) nor a GPT (tok_embeddings.*)"
    raise ConvertError(checkpoint, [f"neither {known}"])


def _convert_gpt(checkpoint: Path, *, out: Path, dtype: Precision) -> int:
    """The generator's converter, found by its name in the table of commands: `layton` does not import `generation`."""
    command = COMMANDS["convert gpt"]
    status: int = getattr(import_module(command.module), command.function)(checkpoint, out=out, dtype=dtype)
    return status


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise UsageError(f"{path} is not a JSON object")
    return config


def _dtype(name: Precision) -> torch.dtype:
    import torch

    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[name]
