"""``layton reconstruct``: image files through their tokens and back, original and result side by side."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layton.data.geometry import FitPolicy
from layton.folder import write_json
from layton.options import require_least
from layton.progress import progress

if TYPE_CHECKING:
    from PIL import Image

    from layton.commands.images import FittedImage
    from layton.commands.reconstruction import Reconstructor


@dataclass(frozen=True, slots=True)
class ReconstructedFile:
    """One line of the report.

    Attributes:
        image: Name of the original.
        file: Name of the picture that was written.
        figures: By name.
    """

    image: str
    file: str
    figures: dict[str, float]

    def to_dict(self) -> dict[str, str | float]:
        """Names and figures on one level."""
        return {"image": self.image, "file": self.file, **self.figures}


def reconstruct(
    images: list[Path],
    *,
    out: Path,
    tokenizer: str = "mini",
    decoder: str | None = None,
    steps: int | None = None,
    condition_scale: float | None = None,
    policy: FitPolicy = "crop",
    seed: int = 0,
    batch_size: int = 4,
    max_bad: int = 0,
    overwrite: bool = False,
    device: str | None = None,
    allow: list[str] | None = None,
    json: Path | None = None,
) -> None:
    """Reconstruct image files: pictures of original and result side by side, PSNR, SSIM and EPD.

    Pictures have the size of what is kept of the original: with the policy "crop" the central square. Figures are
    taken on the square that the decoder gives, before it is brought back to that size, against the original fitted to
    the same square.

    Args:
        images: files, and folders that are searched for .jpg, .jpeg, .png and .webp.
        out: folder to write one PNG file for each image to; made if needed.
        tokenizer: embedded tokenizer or folder.
        decoder: name of the code decoder; the tokenizer's own choice by default.
        steps: network evaluations of the decoder; its own number by default.
        condition_scale: strength of the codes, where the decoder has such a thing.
        policy: how images become square: crop (the central square), pad (white borders) or resize.
        seed: of the noise that decoders begin with, the same for every image.
        batch_size: images reconstructed at once.
        max_bad: unreadable images that are passed over and named; one more is an error.
        overwrite: replace files of the same names; without it they are an error, before anything is reconstructed.
        device: where to run; the accelerator if there is one.
        allow: dotted names, or their beginnings, of classes of your own that a saved part may name.
        json: write figures and how they were taken to this file as well.
    """
    from layton.commands.images import FittedImages, ImageFiles
    from layton.commands.measures import ImageMeasures, in_words, mean_figures
    from layton.commands.reconstruction import Reconstructor
    from layton.loading import load_with_decoder
    from layton.staging import SafeNames, require_free, staged

    require_least(1, {"batch_size": batch_size, "steps": steps})
    require_least(0, {"seed": seed, "max_bad": max_bad})
    files = ImageFiles(images)
    if not overwrite:
        names = SafeNames()
        require_free(out, [names.unique(file.name, suffix=".png") for file in files])
    model, decoder = load_with_decoder(tokenizer, decoder, num_steps=steps, device=device, allow=allow)
    fitted = FittedImages(files, model.image_size, policy=policy, max_bad=max_bad, keep_original=True)
    one = Reconstructor(model, decoder, ImageMeasures(), steps, condition_scale, seed)
    with staged(out, overwrite=overwrite) as folder, progress(len(files), "reconstruct") as bar:
        rows = _write_pictures(one, fitted, folder, batch_size=batch_size, on_batch=bar.update)
    means = mean_figures([row.figures for row in rows])
    lines = [f"{row.image}: {in_words(row.figures)}" for row in rows] + [f"mean of {len(rows)}: {in_words(means)}"]
    lines += [f"no {name.upper()}: {reason}" for name, reason in one.measures.absent.items()]
    sys.stdout.write("\n".join(lines) + "\n")
    if json is not None:
        protocol = one.protocol(
            model=tokenizer, dataset="given files", split="all", policy=policy, num_images=len(rows)
        )
        figures = {"mean": means, "images": [row.to_dict() for row in rows], "absent": one.measures.absent}
        write_json(json, {**figures, "passed_over": fitted.bad, "protocol": protocol.to_dict()})


def _write_pictures(
    one: Reconstructor, fitted: Iterable[FittedImage], folder: Path, *, batch_size: int, on_batch: Callable[[int], Any]
) -> list[ReconstructedFile]:
    from layton.commands.measures import in_words
    from layton.data.threads import batched
    from layton.loading import describe
    from layton.pictures import Cell, side_by_side
    from layton.staging import SafeNames

    decoder = describe(one.tokenizer.decoder(one.decoder), one.decoder, one.num_steps)
    names, rows = SafeNames(), []
    for batch in batched(fitted, batch_size):
        for item, result in zip(batch, one(batch), strict=True):
            row = ReconstructedFile(item.name, names.unique(item.name, suffix=".png"), result.figures)
            caption = f"{decoder}\n{in_words(result.figures)}"
            pair = side_by_side(Cell(kept_part(item), "original"), Cell(result.picture, caption))
            pair.save(folder / row.file)
            rows.append(row)
        on_batch(len(batch))
    if not rows:
        raise ValueError("no readable image among those given")
    return rows


def kept_part(item: FittedImage) -> Image.Image:
    """The part of the original that a reconstruction shows: all but what "crop" cuts away."""
    if item.original is None:
        return item.square
    return item.original.crop(item.geometry.box) if item.geometry.policy == "crop" else item.original
