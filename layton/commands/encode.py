"""``layton encode`` and ``layton decode``: image files to tokens and back."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Literal

from layton.data.geometry import FitPolicy
from layton.errors import UsageError
from layton.folder import write_json
from layton.options import require_least
from layton.progress import progress


def encode(
    images: list[Path],
    *,
    out: Path,
    tokenizer: str = "mini",
    policy: FitPolicy = "crop",
    batch_size: int = 16,
    max_bad: int = 0,
    precision: Literal["fp32", "bf16"] = "fp32",
    overwrite: bool = False,
    device: str | None = None,
    allow: list[str] | None = None,
    json: Path | None = None,
) -> None:
    """Encode image files to one file of codes.

    Args:
        images: files, and folders that are searched for .jpg, .jpeg, .png and .webp.
        out: the safetensors file to write.
        tokenizer: embedded tokenizer or folder.
        policy: how images become square: crop (the central square), pad (white borders) or resize.
        batch_size: images encoded at once.
        max_bad: unreadable images that are passed over and named; one more is an error.
        precision: of the encoder; bf16 is quicker on GPUs, changes about 3 % of the codes, and is recorded with them.
        overwrite: replace a file of codes that is there already.
        device: where to run; the accelerator if there is one.
        allow: dotted names, or their beginnings, of classes of your own that a saved part may name.
        json: write figures to this file as well.
    """
    import torch

    from layton.codes_file import CodesWriter, codes_header, is_codes_file
    from layton.commands.images import FittedImages, ImageFiles
    from layton.commands.reconstruction import stack
    from layton.data.threads import batched
    from layton.loading import load_tokenizer

    require_least(1, {"batch_size": batch_size})
    require_least(0, {"max_bad": max_bad})
    if out.suffix.lower() not in ("", ".safetensors"):
        raise UsageError(f"codes are written as safetensors: name the file .safetensors, not {out.name}")
    if out.is_file() and not is_codes_file(out):
        raise UsageError(f"{out} exists already and holds no codes: take another --out")
    if out.is_file() and not overwrite:
        raise UsageError(f"{out} exists already: take another --out, or say --overwrite")
    files = ImageFiles(images)
    model = load_tokenizer(tokenizer, decoders=[], device=device, allow=allow)
    fitted = FittedImages(files, model.image_size, policy=policy, max_bad=max_bad)
    started = time.perf_counter()
    rough = torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
    header = codes_header(model, policy, precision)
    with CodesWriter(out, header) as writer, progress(len(files), "encode") as bar:
        for batch in batched(fitted, batch_size):
            with rough:  # the search for codes stays in float32
                codes = model.encode(stack([item.square for item in batch]))
            writer.add(codes, [item.name for item in batch], [item.geometry for item in batch])
            bar.update(len(batch))
        writer.finish()
    seconds = time.perf_counter() - started
    figures = {
        "images": writer.count,
        "passed_over": fitted.bad,
        "tokens_per_image": model.num_tokens,
        "seconds": seconds,
        "images_per_second": writer.count / seconds,
        "fingerprint": writer.header.fingerprint,
    }
    sys.stdout.write(f"{out}: {writer.count} images, {figures['images_per_second']:.1f} images/s\n")
    if json is not None:
        write_json(json, figures)


def decode(
    codes: Path,
    *,
    out: Path,
    tokenizer: str = "mini",
    decoder: str | None = None,
    steps: int | None = None,
    condition_scale: float | None = None,
    seed: int = 0,
    batch_size: int = 8,
    overwrite: bool = False,
    device: str | None = None,
    allow: list[str] | None = None,
) -> None:
    """Decode a file of codes to PNG files.

    Pictures have the sizes that were kept of the originals: with the policy "crop" that of the central square, else the
    whole. Nothing is written before the whole file has been checked and decoded.

    Args:
        codes: a file that `layton encode` wrote.
        out: folder to write; made if needed.
        tokenizer: the tokenizer that made the codes: embedded tokenizer or folder.
        decoder: name of the code decoder; the tokenizer's own choice by default.
        steps: network evaluations of the decoder; its own number by default.
        condition_scale: strength of the codes, where the decoder has such a thing.
        seed: of the noise that decoders begin with, the same for every image.
        batch_size: images decoded at once.
        overwrite: replace files of the same names; without it they are an error, before anything is decoded.
        device: where to run; the accelerator if there is one.
        allow: dotted names, or their beginnings, of classes of your own that a saved part may name.
    """
    from layton.codes_file import CodesFile, require_codes_of
    from layton.loading import load_with_decoder, same_noise
    from layton.staging import SafeNames, require_free, staged
    from layton.tokenizer import EncodedImages

    require_least(1, {"batch_size": batch_size, "steps": steps})
    require_least(0, {"seed": seed})
    file = CodesFile(codes)
    model, decoder = load_with_decoder(tokenizer, decoder, num_steps=steps, device=device, allow=allow)
    require_codes_of(model, file)
    names = SafeNames()
    pictures_of = [names.unique(name, suffix=".png") for name in file.names]
    if not overwrite:
        require_free(out, pictures_of)
    with staged(out, overwrite=overwrite) as folder, progress(len(file), "decode") as bar:
        for start, stop in file.pieces(batch_size):
            pictures = model.decode_images(
                EncodedImages(file.codes(start, stop), tuple(file.geometries(start, stop))),
                decoder=decoder,
                num_steps=steps,
                conditioning_scale=condition_scale,
                generator=same_noise(seed, stop - start),
            )
            for name, picture in zip(pictures_of[start:stop], pictures, strict=True):
                picture.save(folder / name)
            bar.update(stop - start)
    sys.stdout.write(f"{out}: {len(file)} images\n")
