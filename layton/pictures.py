"""Sheets of pictures with words beside and under them, for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from layton.folder import write_atomically

_MARGIN = 8
_TEXT_SIZE = 14
_LINE = 18
_INK = (20, 20, 20)
_PAPER = (255, 255, 255)


@dataclass(frozen=True, slots=True, eq=False)
class Cell:
    """One picture of a sheet.

    Attributes:
        image: Of any size; shrunk or enlarged to fit its cell.
        caption: What stands under it.
    """

    image: Image.Image
    caption: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One row of a sheet.

    Attributes:
        label: What stands left of it.
        cells: Its pictures.
    """

    label: str
    cells: Sequence[Cell]


def sheet(rows: Sequence[Row], *, title: str, cell: int = 192) -> Image.Image:
    """All rows in one picture.

    Args:
        rows: From top to bottom.
        title: The line at the top.
        cell: Side of a cell in pixels.

    Raises:
        ValueError: If there is no picture at all.
    """
    columns = max((len(row.cells) for row in rows), default=0)
    if not columns:
        raise ValueError("no pictures to show")
    label_width = max(cell * 3 // 4, *(_widest_word(row.label) + _MARGIN for row in rows))
    width = label_width + columns * (cell + _MARGIN) + _MARGIN
    blocks = [_draw_row(row, label_width, width, cell) for row in rows]
    heading = _wrap(title, width - 2 * _MARGIN)
    top = 2 * _MARGIN + _LINE * len(heading)
    canvas = Image.new("RGB", (width, top + sum(block.height for block in blocks)), _PAPER)
    _write(canvas, heading, (_MARGIN, _MARGIN))
    for block in blocks:
        canvas.paste(block, (0, top))
        top += block.height
    return canvas


def side_by_side(left: Cell, right: Cell) -> Image.Image:
    """Two pictures of one size next to each other at full size, captions above."""
    width, height = left.image.size
    column = max(width, 2 * _MARGIN + max(_widest_word(left.caption), _widest_word(right.caption)))
    captions = [_wrap(cell.caption, column - _MARGIN) for cell in (left, right)]
    top = _MARGIN + _LINE * max(map(len, captions))
    canvas = Image.new("RGB", (2 * column + _MARGIN, top + height), _PAPER)
    for number, (cell, lines) in enumerate(zip((left, right), captions, strict=True)):
        x = number * (column + _MARGIN)
        _write(canvas, lines, (x + 2, 2))
        canvas.paste(cell.image, (x, top))
    return canvas


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG file atomically."""
    write_atomically(path, lambda part: image.save(part, "PNG"))


def _draw_row(row: Row, label_width: int, width: int, cell: int) -> Image.Image:
    label = _wrap(row.label, label_width - _MARGIN)
    captions = [_wrap(item.caption, cell) for item in row.cells]
    under = _LINE * max(map(len, captions), default=0)
    block = Image.new("RGB", (width, max(cell + under, _LINE * len(label)) + 2 * _MARGIN), _PAPER)
    _write(block, label, (_MARGIN, _MARGIN))
    for number, (item, lines) in enumerate(zip(row.cells, captions, strict=True)):
        x = label_width + _MARGIN + number * (cell + _MARGIN)
        picture = _fit(item.image, cell)
        block.paste(picture, (x + (cell - picture.width) // 2, _MARGIN + (cell - picture.height) // 2))
        _write(block, lines, (x, _MARGIN + cell + 2))
    return block


def _fit(image: Image.Image, cell: int) -> Image.Image:
    scale = cell / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _wrap(text: str, width: int) -> list[str]:
    """Lines no wider than ``width`` pixels, except words that are; line breaks of the text are kept."""
    font, lines = _font(), []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return lines


def _widest_word(text: str) -> int:
    return max((int(_font().getlength(word)) + 1 for word in text.split()), default=0)


def _write(canvas: Image.Image, lines: Sequence[str], place: tuple[int, int]) -> None:
    draw = ImageDraw.Draw(canvas)
    for number, line in enumerate(lines):
        draw.text((place[0], place[1] + number * _LINE), line, fill=_INK, font=_font())


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(_TEXT_SIZE)


def to_uint8(images: NDArray[np.floating]) -> list[NDArray[np.uint8]]:
    """Pictures (B, H, W, 3) in [0, 1], as diffusers' pipelines give them, rounded: uint8 (H, W, 3) each.

    Raises:
        ValueError: One holds values that are not finite, which would come out black.
    """
    broken = [number for number, image in enumerate(images) if not np.isfinite(image).all()]
    if broken:
        raise ValueError(
            f"{len(broken)} of {len(images)} pictures drawn hold values that are not finite: weights are broken, or "
            "too large for their type (half precision)"
        )
    return [np.round(image * 255).astype(np.uint8) for image in images]
