"""``layton generate``: text to image with LaytonGen."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from layton.commands.calling import progress
from layton.commands.reports import write_json
from layton.errors import UsageError


def generate(
    prompt: str,
    *,
    out: Path = Path("generated"),
    model: str = "mini",
    tokenizer: str | None = None,
    decoder: str | None = None,
    steps: int | None = None,
    seed: int = 0,
    num_images: int = 1,
    guidance_scale: float | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    batch_size: int = 16,
    device: str | None = None,
    json: Path | None = None,
) -> None:
    """Draw images from a prompt; the same prompt and seed give the same picture.

    Args:
        prompt: what to draw.
        out: folder for the PNG files; made if needed.
        model: embedded model or folder with a generator.
        tokenizer: its tokenizer, where it does not lie beside the generator.
        decoder: name of the code decoder; the tokenizer's own choice by default.
        steps: network evaluations of the decoder; its own number by default.
        seed: of the first image; the following images count up from it.
        num_images: how many.
        guidance_scale: of classifier-free guidance; 1 is none; the model's own by default.
        temperature: 0 takes the likeliest code each time; the model's own by default.
        top_k: number of likeliest codes to draw among; 0 for all.
        top_p: share of the likeliest codes to draw among; 1 for all.
        batch_size: images drawn at once.
        device: where to run; the accelerator if there is one.
        json: write settings, times and files to this file as well.
    """
    import torch

    from generation.drawing import LaytonGenDrawer
    from generation.pipeline import MAX_IMAGES
    from layton.commands.staging import safe_stem, staged

    if not 1 <= num_images <= MAX_IMAGES or seed < 0 or batch_size < 1:
        raise UsageError(
            f"need num_images in [1, {MAX_IMAGES}], batch_size >= 1, seed >= 0; got {num_images}, {batch_size}, {seed}"
        )
    started = time.perf_counter()
    draw = LaytonGenDrawer.load(
        model,
        tokenizer=tokenizer,
        decoder=decoder,
        num_steps=steps,
        guidance_scale=guidance_scale,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        device=device,
    )
    loaded = time.perf_counter()
    batches = -(-num_images // batch_size)
    with staged(out) as folder, progress(batches * draw.pipeline.num_tokens, "generate") as bar:
        result = draw.pipeline(
            prompt,
            num_images_per_prompt=num_images,
            guidance_scale=guidance_scale,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            num_inference_steps=steps,
            decoder=draw.decoder,
            generator=[torch.Generator().manual_seed(seed + number) for number in range(num_images)],
            callback_on_step_end=lambda *_: bar.update(1),
            batch_size=batch_size,
        )
        names = [f"{safe_stem(f'{prompt}.png')}-{seed + number}.png" for number in range(num_images)]
        for name, image in zip(names, result.images, strict=True):
            image.save(folder / name)
    seconds = time.perf_counter() - loaded
    sys.stdout.write(f"{out}: {', '.join(names[:4])}{' ...' * (num_images > 4)} in {seconds:.1f} s\n")
    if json is not None:
        times = {"loading": loaded - started, "drawing": seconds}
        settings = {**draw.settings(), "prompt": prompt, "seed": seed}
        write_json(json, {"settings": settings, "seconds": times, "files": names})
