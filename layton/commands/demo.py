"""``layton demo``: what the embedded weights can do, on pictures and prompts of its own."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layton.folder import write_json
from layton.progress import progress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from layton.commands.images import FittedImage
    from layton.pictures import Cell, Row
    from layton.sceneval import PromptSpec
    from layton.tokenizer import LaytonTokenizer

_SEED = 2_000_000_000  # scenes from here on are test scenes
# name, side of the scenes, scenes in one row, rows of scenes: several sizes, wide and tall
_SAMPLES = (
    ("256x256", 256, 1, 1),
    ("64x64", 64, 1, 1),
    ("200x200", 200, 1, 1),
    ("1024x1024", 1024, 1, 1),
    ("480x240", 240, 2, 1),
    ("160x320", 160, 1, 2),
)
IMAGES_PER_TASK = 3
IMAGES_BY_EVERY_DECODER = 1  # of them
_GENERATOR = "generation.demonstration"  # resolved when it is needed: this package does not import that one


def demo(
    *,
    out: Path = Path("demo"),
    tokenizer: str = "mini",
    device: str | None = None,
    allow: list[str] | None = None,
) -> None:
    """Reconstruct sample images with every decoder and draw images from prompts; pictures and figures to a folder.

    Writes reconstructions.png, report.json and, if there is a LaytonGen or another text-to-image model beside the
    tokenizer, generations.png. The samples are rendered here; no photograph and no network is needed.

    Args:
        out: folder to write; made if needed.
        tokenizer: embedded tokenizer or folder.
        device: where to run; the accelerator if there is one.
        allow: dotted names, or their beginnings, of classes of your own that a saved part may name.
    """
    from layton.loading import load_tokenizer
    from layton.pictures import sheet
    from layton.staging import staged

    started = time.perf_counter()
    model = load_tokenizer(tokenizer, device=device, allow=allow)
    report: dict[str, Any] = {"tokenizer": tokenizer, "tokens_per_image": model.num_tokens}
    with staged(out) as folder:
        rows, report["reconstructions"] = reconstruct_samples(model, tokenizer)
        title = f"Scenes as {model.num_tokens} tokens, and what each decoder makes of them"
        sheet(rows, title=title).save(folder / "reconstructions.png")
        rows, report["generations"] = generate_samples(tokenizer, device, allow)
        if rows:
            title = "Drawn from text, one row for each task; the checker's verdict under each picture"
            sheet(rows, title=title).save(folder / "generations.png")
        report["seconds"] = time.perf_counter() - started
        write_json(folder / "report.json", report)
    sys.stdout.write("\n".join(_summary(report, out)) + "\n")


def sample_images(size: int) -> list[FittedImage]:
    """Scenes of test seeds in several sizes and shapes, fitted to squares of ``size`` pixels with nothing cut away."""
    import numpy as np
    from PIL import Image

    from layton.commands.images import FittedImage
    from layton.data.geometry import fit_image
    from layton.scenes import render, sample_scene

    images, seed = [], _SEED
    for name, side, columns, lines in _SAMPLES:
        drawn = [render(sample_scene(seed + number), side) for number in range(columns * lines)]
        seed += len(drawn)
        pixels = np.concatenate([np.concatenate(drawn[line * columns :][:columns], 1) for line in range(lines)], 0)
        original = Image.fromarray(pixels)
        images.append(FittedImage(name, original, *fit_image(original, size, policy="pad")))
    return images


def reconstruct_samples(model: LaytonTokenizer, name: str) -> tuple[list[Row], dict[str, Any]]:
    """Rows of pictures (originals, then one row for each decoder) and figures by decoder."""
    from layton.commands.measures import ImageMeasures, mean_figures
    from layton.commands.reconstruction import Reconstructor
    from layton.loading import describe
    from layton.pictures import Cell, Row

    samples, measures = sample_images(model.image_size), ImageMeasures()
    rows = [Row("originals", [Cell(item.original or item.square, item.name) for item in samples])]
    figures: dict[str, Any] = {"absent": measures.absent}
    with progress(len(model.decoders), "reconstruct") as bar:
        for decoder in model.decoders:
            started = time.perf_counter()
            one = Reconstructor(model, decoder, measures)
            results = one(samples)
            seconds = time.perf_counter() - started
            cells = [Cell(r.picture, f"{r.figures['psnr']:.1f} dB") for r in results]
            rows.append(Row(describe(model.decoder(decoder), decoder, None), cells))
            protocol = one.protocol(
                model=name, dataset="demo scenes", split="test", policy="pad", num_images=len(samples)
            )
            figures[decoder] = {
                "mean": mean_figures([result.figures for result in results]),
                "images": {item.name: result.figures for item, result in zip(samples, results, strict=True)},
                "seconds": seconds,
                "protocol": protocol.to_dict(),
            }
            bar.update(1)
    return rows, figures


def generate_samples(
    name: str, device: str | None, allow: Sequence[str] | None = None
) -> tuple[list[Row], dict[str, Any]]:
    """Rows of pictures by task, and the checker's verdicts: of LaytonGen, or else of the diffusion model.

    No rows where there is neither.
    """
    if import_module(_GENERATOR).has_generator(name):
        return generate_by_laytongen(name, device, allow)
    return generate_by_diffusion(name, device)


def generate_by_laytongen(
    name: str, device: str | None, allow: Sequence[str] | None = None
) -> tuple[list[Row], dict[str, Any]]:
    """Prompts of every task as tokens, shown by every decoder; the report counts those of the default decoder."""
    from PIL import Image

    from layton.pictures import Cell, Row
    from layton.sceneval import make_prompts
    from layton.sceneval.report import PROTOCOL

    specs = make_prompts(IMAGES_PER_TASK)
    few = [number for number in range(len(specs)) if number % IMAGES_PER_TASK < IMAGES_BY_EVERY_DECODER]
    with progress(len(specs), "generate") as bar:
        drawn = import_module(_GENERATOR).draw_samples(
            name, [spec.prompt for spec in specs], few, device=device, allow=allow
        )
        bar.update(len(specs))
    rows: list[Row] = []
    figures: dict[str, Any] = {}
    shown: dict[int, list[Cell]] = {number: [] for number in few}
    for decoder, pictures in drawn.pictures.items():
        found, verdicts = _judge([(number, specs[number], pixels) for number, pixels in pictures.items()])
        rows = rows or [Row(f"{row.label}, decoder {decoder}", row.cells) for row in found]
        figures[decoder] = {"right": sum(v["right"] for v in verdicts), "of": len(verdicts), "images": verdicts}
        for number, cells in shown.items():
            verdict = next(each for each in verdicts if each["seed"] == number)
            words = f"{decoder}\n{'right' if verdict['right'] else 'wrong: ' + verdict['wrong'][0]}"
            cells.append(Cell(Image.fromarray(pictures[number]), words))
    rows += [Row(f"the same tokens by every decoder: {specs[n].prompt}", cells) for n, cells in shown.items()]
    default = next(iter(figures.values()))
    return rows, {**default, "decoders": figures, "protocol": {"checker": PROTOCOL, **drawn.settings}}


def generate_by_diffusion(name: str, device: str | None) -> tuple[list[Row], dict[str, Any]]:
    """Prompts of every task drawn by the latent diffusion model."""
    from layton.assets import find_pipeline
    from layton.ldm.drawing import DEFAULT_GUIDANCE, DEFAULT_STEPS, TextToImage
    from layton.sceneval import make_prompts
    from layton.sceneval.report import PROTOCOL

    try:
        folder = find_pipeline(name)
    except ValueError as error:
        return [], {"absent": str(error)}
    draw = TextToImage.load(folder, num_steps=DEFAULT_STEPS, guidance_scale=DEFAULT_GUIDANCE, device=device)
    specs = make_prompts(IMAGES_PER_TASK)
    drawn: list[tuple[int, PromptSpec, NDArray[np.uint8]]] = []
    with progress(len(specs), "generate") as bar:
        for start in range(0, len(specs), IMAGES_PER_TASK):
            batch = specs[start : start + IMAGES_PER_TASK]
            seeds = list(range(start, start + len(batch)))
            drawn += zip(seeds, batch, draw([spec.prompt for spec in batch], seeds), strict=True)
            bar.update(len(batch))
    rows, images = _judge(drawn)
    figures = {"right": sum(image["right"] for image in images), "of": len(images), "images": images}
    protocol = {"checker": PROTOCOL, "steps": draw.num_steps, "guidance_scale": draw.guidance_scale}
    return rows, {**figures, "protocol": protocol}


def _judge(drawn: Sequence[tuple[int, PromptSpec, NDArray[np.uint8]]]) -> tuple[list[Row], list[dict[str, Any]]]:
    """Rows of pictures by task with the checker's verdict under each, and the verdicts."""
    from PIL import Image

    from layton.pictures import Cell, Row
    from layton.sceneval import check

    rows: dict[str, list[Cell]] = {}
    images: list[dict[str, Any]] = []
    for seed, spec, pixels in drawn:
        verdict = check(pixels, spec)
        words = "right" if verdict.correct else f"wrong: {verdict.reasons[0]}"
        rows.setdefault(spec.task, []).append(Cell(Image.fromarray(pixels), f"{spec.prompt}\n{words}"))
        images.append({"prompt": spec.prompt, "seed": seed, "right": verdict.correct, "wrong": verdict.reasons})
    return [Row(task.replace("_", " "), cells) for task, cells in rows.items()], images


def _summary(report: dict[str, Any], out: Path) -> Sequence[str]:
    from layton.commands.measures import in_words

    reconstructions, generations = report["reconstructions"], report["generations"]
    lines = [
        f"reconstructed with {name}: {in_words(values['mean'])} ({values['seconds']:.1f} s)"
        for name, values in reconstructions.items()
        if "mean" in values
    ]
    lines += [f"no {name.upper()}: {reason}" for name, reason in reconstructions["absent"].items()]
    lines += [
        f"drawn from text with decoder {name}: {values['right']} of {values['of']} right by the checker"
        for name, values in generations.get("decoders", {}).items()
    ]
    if "of" in generations and "decoders" not in generations:
        lines.append(f"drawn from text: {generations['right']} of {generations['of']} right by the checker")
    elif "absent" in generations:
        lines.append(f"nothing drawn from text: {generations['absent']}")
    files = "reconstructions.png" + ", generations.png" * ("of" in generations)
    return [*lines, f"{out}: {files}, report.json, in {report['seconds']:.0f} s"]
