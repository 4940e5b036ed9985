"""Puts the exports of finished runs together into one tokenizer folder, in fp16: how the embedded ``mini`` was made.

python tools/assemble.py --tokenizer runs/tokenizer/export --out my_tokenizer \
        [--ldm runs/text_to_image/export] [--decoder runs/decoder/export/decoder] \
        [--consistency runs/consistency_pixel/export/decoder] [--instaflow runs/instaflow/export/decoder] \
        [--hipa runs/hipa/export/decoder] [--laytongen runs/laytongen/export] \
        [--planner runs/laytongen_planner/export/planner]

Or adds a generator to a folder that has everything else, which is copied:

python tools/assemble.py --tokenizer my_tokenizer --laytongen runs/laytongen/export --out my_tokenizer_2
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging

from generation.decoders import HiPADecoder, InstaFlowDecoder
from generation.generator import PART, load_generator, save_generator
from generation.planner import LayoutPlanner
from layton.control import load_unet
from layton.decoders import ConsistencyDecoder, DiffusionDecoder, LightDecoder
from layton.interface import CodeDecoder
from layton.ladd import LADD
from layton.ldm.autoencoder import Autoencoder
from layton.ldm.cache import code_size, load_code_parts
from layton.ldm.teacher import load_parts
from layton.tasks.tokenizer import DEFAULT_SIZE
from layton.tokenizer import LDM_FOLDER, LaytonTokenizer
from layton.vqgan_decoder import VQGANCodeDecoder

DISTILLED: dict[str, type[ConsistencyDecoder]] = {
    "consistency": ConsistencyDecoder,
    "instaflow": InstaFlowDecoder,
    "hipa": HiPADecoder,
}


def main() -> None:
    """Assemble from the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="export of stage 0, or a tokenizer folder")
    parser.add_argument("--out", type=Path, required=True, help="tokenizer folder to write")
    parser.add_argument("--ldm", type=Path, help="export of the text-to-image run, a diffusers pipeline folder")
    parser.add_argument("--decoder", type=Path, help="decoder of the stage-1 run; needs --ldm")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the noise the stage-1 decoder begins with")
    parser.add_argument(
        "--time_shift", type=float, default=1.0, help="of the stage-1 decoder's times, > 1 to noisy ones"
    )
    parser.add_argument("--condition_scale", type=float, default=1.0, help="of the codes in the stage-1 decoder")
    parser.add_argument(
        "--latents_per_token",
        type=float,
        default=1.0,
        help="of the stage-1 decoder, along a side: 8 for 1024 px on SDXL",
    )
    parser.add_argument("--consistency", type=Path, help="decoder of the stage-2 run; needs --decoder")
    parser.add_argument("--instaflow", type=Path, help="decoder of the InstaFlow run; needs --decoder")
    parser.add_argument("--hipa", type=Path, help="decoder of the HiPA run; needs --decoder")
    parser.add_argument("--laytongen", type=Path, help="export of the LaytonGen run, trained on this tokenizer")
    parser.add_argument("--planner", type=Path, help="planner of its run's export; needs --laytongen")
    arguments = parser.parse_args()
    for name, needed in {"planner": "laytongen", "decoder": "ldm", **dict.fromkeys(DISTILLED, "decoder")}.items():
        if getattr(arguments, name) is not None and getattr(arguments, needed) is None:
            parser.error(f"--{name} needs --{needed}, which it was trained with")
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists")
    part = arguments.out.with_name(f".{arguments.out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    diffusers_logging.disable_progress_bar()
    try:
        write(arguments, part)
    except (OSError, ValueError) as error:
        shutil.rmtree(part, ignore_errors=True)
        parser.exit(1, f"{error}\n")
    part.rename(arguments.out)
    print(f"{arguments.out}: {', '.join(sorted(inventory(arguments.out)))}")


def write(arguments: argparse.Namespace, part: Path) -> None:
    """Write the folder: a copy of a whole one, or one of exports; the generator in either."""
    whole = arguments.ldm is None and (arguments.tokenizer / "decoders").is_dir()
    if whole:
        tokenizer = LaytonTokenizer.from_pretrained(arguments.tokenizer, decoders=[])
        shutil.copytree(arguments.tokenizer, part)
    else:
        encoder, quantizer = load_code_parts(arguments.tokenizer)
        size = code_size(arguments.tokenizer) or DEFAULT_SIZE
        tokenizer = LaytonTokenizer(encoder, quantizer, all_decoders(arguments), image_size=size)
    generator = None if arguments.laytongen is None else load_generator(arguments.laytongen)
    if generator is not None:
        generator.card.require_tokenizer(tokenizer)
        if arguments.planner is not None:
            generator = replace(generator, planner=LayoutPlanner.from_pretrained(arguments.planner))
    if arguments.ldm is not None:
        copy_pipeline(arguments.ldm, part / LDM_FOLDER)
    if not whole:
        tokenizer.save_pretrained(part, dtype=torch.float16)
    if generator is not None:
        shutil.rmtree(part / PART, ignore_errors=True)
        save_generator(part / PART, generator, dtype=torch.float16)
        clean_configs(part / PART)


def all_decoders(arguments: argparse.Namespace) -> dict[str, CodeDecoder]:
    """The tokenizer's own, and those of the runs."""
    light = light_folder(arguments.tokenizer)
    decoders = own_decoders(arguments.tokenizer)
    if arguments.decoder is not None:
        unet = load_unet(arguments.ldm / "unet")
        network = LADD.from_pretrained(arguments.decoder, unet=unet, reader=light)
        network.conditioning_scale = arguments.condition_scale
        decoders["diffusion"] = DiffusionDecoder(
            network,
            Autoencoder.from_pretrained(arguments.ldm / "vae"),
            temperature=arguments.temperature,
            time_shift=arguments.time_shift,
            latents_per_token=arguments.latents_per_token,
        )
    for name, kind in DISTILLED.items():
        folder: Path | None = getattr(arguments, name)
        if folder is not None:
            decoders[name] = kind.from_pretrained(folder, ldm=arguments.ldm, base=arguments.decoder, reader=light)
    return decoders


def inventory(folder: Path) -> set[str]:
    """What is in a tokenizer folder, decoders by name."""
    parts = {path.name for path in folder.iterdir() if path.is_dir()} - {"decoders"}
    return parts | {f"decoders/{path.name}" for path in folder.glob("decoders/*")}


def light_folder(folder: Path) -> Path | None:
    """Where the light decoder of an export of stage 0, or of a tokenizer folder, lies; a converted one has none."""
    places = (folder / "decoders" / "light", folder / "decoder")
    return next((place for place in places if place.is_dir()), None)


def own_decoders(folder: Path) -> dict[str, CodeDecoder]:
    """The decoder that needs no diffusion model: the light one, or that of a converted LlamaGen tokenizer."""
    light, vqgan = light_folder(folder), folder / "decoders" / "vqgan"
    if light is not None:
        return {"light": LightDecoder.from_pretrained(light)}
    return {"vqgan": VQGANCodeDecoder.from_pretrained(vqgan)} if vqgan.is_dir() else {}


def copy_pipeline(source: Path, target: Path) -> None:
    """Copy a diffusers pipeline folder with its weights in fp16."""
    if source.resolve() == target.resolve():
        return
    shutil.rmtree(target, ignore_errors=True)
    pipeline = load_parts(DiffusionPipeline, source, {}, dtype=torch.float16)
    torch.nn.Module.to(pipeline.vae, torch.float16)  # diffusers' own warns of nothing
    pipeline.save_pretrained(target, safe_serialization=True)
    clean_configs(target)


def clean_configs(folder: Path) -> None:
    """Strike out what diffusers and transformers write into their configs: where parts were loaded from, and a type.

    transformers would load a part in the type that its config names, and half precision does not run on a CPU.
    """
    for path in folder.rglob("*.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            continue
        cleaned = {name: value for name, value in config.items() if name != "_name_or_path"}
        cleaned |= {"dtype": "float32"} if "dtype" in config else {}
        if cleaned != config:
            path.write_text(json.dumps(cleaned, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
