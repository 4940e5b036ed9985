"""GenEval's folder layout: ``OUT/00000/metadata.jsonl`` and ``OUT/00000/samples/0000.png`` onwards."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from layton.folder import write_atomically, write_text
from layton.sceneval.spec import PromptSpec

_SAMPLE: Final = re.compile(r"\d+\.png")


@dataclass(frozen=True, slots=True)
class PromptFolder:
    """One prompt's folder.

    Attributes:
        spec: its prompt.
        samples: the image files, by name.
    """

    spec: PromptSpec
    samples: tuple[Path, ...]

    def images(self) -> list[NDArray[np.uint8]]:
        """Read the samples, uint8 (H, W, 3) each."""
        arrays = []
        for path in self.samples:
            with Image.open(path) as image:
                arrays.append(np.asarray(image.convert("RGB")))
        return arrays


def write_folder(out: Path, index: int, spec: PromptSpec, images: Sequence[NDArray[np.uint8]]) -> Path:
    """Write one prompt's folder.

    Args:
        out: the run's folder.
        index: number of the prompt, which names the folder.
        spec: the prompt.
        images: uint8 (H, W, 3) each.

    Returns:
        The folder written.
    """
    folder = out / f"{index:05d}"
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    write_text(folder / "metadata.jsonl", spec.to_json() + "\n")
    for number, image in enumerate(images):
        picture = Image.fromarray(image)
        write_atomically(folder / "samples" / f"{number:04d}.png", partial(picture.save, format="PNG"))
    return folder


def read_folders(out: Path) -> Iterator[PromptFolder]:
    """Read a run's folders in order; names that are not all digits are skipped, as GenEval does.

    Yields:
        One prompt's folder.

    Raises:
        ValueError: if ``out`` has no prompt folder, or a folder's metadata is broken.
        OSError: if ``out`` or a metadata file cannot be read.
    """
    folders = sorted((f for f in out.iterdir() if f.name.isdigit() and f.is_dir()), key=lambda f: int(f.name))
    if not folders:
        raise ValueError(f"{out}: no prompt folders (00000, 00001, ...)")
    for folder in folders:
        metadata = folder / "metadata.jsonl"
        try:
            spec = PromptSpec.from_json(metadata.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{metadata}: {error}") from error
        samples = folder / "samples"
        files = sorted(f for f in samples.iterdir() if _SAMPLE.fullmatch(f.name)) if samples.is_dir() else []
        yield PromptFolder(spec, tuple(files))
