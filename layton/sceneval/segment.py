"""From pixels to connected patches of one colour on a smooth background.

A pixel is explained as a mixture ``background + a (colour - background)`` with one palette colour. Soft edges
then lie on the line to their own object's colour, where a nearest-colour rule would take the edge of a black
object for brown.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from layton.scenes.world import COLOURS, Colour

Field = NDArray[np.float32]
Mask = NDArray[np.bool_]

COLOUR_NAMES: Final = tuple(COLOURS)
PALETTE: Final[Field] = np.array(list(COLOURS.values()), np.float32)  # (10, 3)

_NEAR_PALETTE: Final = 45.0  # RGB distance below which a pixel is left out of the first background fit
_NEAR_FIT: Final = 30.0  # ... and above which it is left out of the following fits
_FOREGROUND: Final = 24.0  # RGB distance from the background below which a pixel is surely background
_GRID: Final = 48  # points per side that the background is fitted to


@dataclass(frozen=True, slots=True, eq=False)
class Segmentation:
    """Every pixel's palette colour and how much of it there is.

    Attributes:
        labels: int8 (H, W), -1 for background, else the index into ``COLOUR_NAMES``.
        alpha: float32 (H, W) in [0, 1], share of the labelled colour in the pixel's mixture; where the label is
            background, that of the colour that explains the pixel best.
        nearest: int8 (H, W), the colour ``alpha`` refers to, also where the label is background; -1 where the
            pixel is plain background.
    """

    labels: NDArray[np.int8]
    alpha: Field
    nearest: NDArray[np.int8]


def estimate_background(image: Field) -> Field:
    """Fit a quadratic in (x, y) to each channel, trimming what is not background.

    Args:
        image: float32 (H, W, 3) in [0, 255].

    Returns:
        float32 (H, W, 3).
    """
    height, width, _ = image.shape
    rows = np.linspace(0, height - 1, min(_GRID, height)).astype(np.intp)
    columns = np.linspace(0, width - 1, min(_GRID, width)).astype(np.intp)
    samples = image[np.ix_(rows, columns)].reshape(-1, 3)
    x, y = _unit(width), _unit(height)
    basis = _quadratic(*np.meshgrid(x[columns], y[rows])).reshape(-1, 6)
    away = np.sqrt(((samples[:, None] - PALETTE) ** 2).sum(-1)).min(1) > _NEAR_PALETTE
    keep = away if away.mean() > 0.2 else np.ones_like(away)
    fit = np.zeros((6, 3))
    for limit in (2 * _NEAR_FIT, _NEAR_FIT, _NEAR_FIT):
        fit = np.linalg.lstsq(basis[keep], samples[keep], rcond=None)[0]
        close = np.linalg.norm(samples - basis @ fit, axis=1) < limit
        if close.mean() < 0.1:
            break
        keep = close
    # The quadratic is separable: (H, 3 terms in y) against (3 terms in x, W * 3).
    coefficients = np.zeros((3, 3, 3))
    for k, (px, py) in enumerate(_POWERS):
        coefficients[py, px] = fit[k]
    left = np.stack([np.ones_like(y), y, y**2], 1)
    right = np.einsum("xp,qpc->qxc", np.stack([np.ones_like(x), x, x**2], 1), coefficients)
    product = left.astype(np.float32) @ right.reshape(3, -1).astype(np.float32)
    return product.reshape(height, width, 3)


_POWERS: Final = ((0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (0, 2))


def _unit(length: int) -> NDArray[np.float64]:
    return (np.arange(length) + 0.5) / length * 2 - 1


def _quadratic(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.stack([x**px * y**py for px, py in _POWERS], -1)


def segment(image: Field) -> Segmentation:
    """Explain each pixel as background and at most one palette colour.

    Args:
        image: float32 (H, W, 3) in [0, 255].

    Returns:
        The segmentation.
    """
    background = estimate_background(image)
    offset = image - background
    candidates = np.flatnonzero((offset * offset).sum(-1).ravel() > _FOREGROUND**2)
    pixels = offset.reshape(-1, 3)[candidates]  # (n, 3)
    lines = PALETTE - background.reshape(-1, 3)[candidates, None]  # (n, 10, 3)
    along = np.einsum("nc,nkc->nk", pixels, lines)
    length = np.einsum("nkc,nkc->nk", lines, lines)
    share = np.clip(along / np.maximum(length, 1), 0, 1)
    # |p - a l|^2 without building the difference.
    residual = (pixels * pixels).sum(1)[:, None] - 2 * share * along + share * share * length
    best = residual.argmin(1)
    picked = share[np.arange(len(best)), best]
    alpha = np.zeros(image.shape[:2], np.float32)
    nearest = np.full(image.shape[:2], -1, np.int8)
    alpha.ravel()[candidates] = picked
    nearest.ravel()[candidates] = best
    return Segmentation(np.where(alpha > 0.5, nearest, np.int8(-1)), alpha, nearest)


def mean_colour(image: Field, weight: Field) -> tuple[Colour, float]:
    """The palette colour nearest to a weighted mean, and its RGB distance.

    Args:
        image: float32 (H, W, 3) in [0, 255].
        weight: float32 (H, W), not all zero.

    Returns:
        The colour's name and the distance in grey levels.
    """
    mean = (image * weight[..., None]).sum((0, 1)) / weight.sum()
    distances = np.linalg.norm(PALETTE - mean, axis=1)
    best = int(distances.argmin())
    return COLOUR_NAMES[best], float(distances[best])
