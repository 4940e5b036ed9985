"""Find every object of a Scenes-like image: shape, colour, place and size. Classical, deterministic, untrained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from layton.scenes.world import Colour, Shape
from layton.sceneval.components import Component, connected_components
from layton.sceneval.fitting import Field, Patch, Pose, best_fit
from layton.sceneval.segment import COLOUR_NAMES, Segmentation, mean_colour, segment
from layton.sceneval.splitting import split_fit

_WORKING_SIZE: Final = 256  # larger images are reduced to it: shapes are recognised at this size
_MIN_AREA: Final = 0.0015  # of the image; the smallest object (a star of 12 % diameter) covers 0.0048
_MIN_PIXELS: Final = 12
_MARGIN: Final = 4
_SOLID_PERCENTILE: Final = 70  # the rest of a small object may be soft outline
MIN_SCORE: Final = 0.50  # outline further off than tolerated: the patch is no shape
_SINGLE_IS_FINE: Final = 0.70  # above it nobody looks for several shapes in one patch
_SPLIT_GAIN: Final = 0.02  # in intersection over union
_MAX_COLOUR_DISTANCE: Final = 85.0  # RGB distance of the mean colour from the palette


@dataclass(frozen=True, slots=True)
class FoundObject:
    """An object as seen in an image.

    Attributes:
        shape: its form.
        colour: the palette colour nearest to its mean.
        cx: centre, from the left, as a fraction of the longer side.
        cy: centre, from the top, as a fraction of the longer side.
        diameter: of the circumscribed circle, as a fraction of the longer side.
        score: quality of the fitted outline, 1 perfect, 0.5 the worst that is tolerated, never below 0.
    """

    shape: Shape
    colour: Colour
    cx: float
    cy: float
    diameter: float
    score: float


def find_objects(image: NDArray[np.uint8] | Image.Image, *, min_score: float = MIN_SCORE) -> list[FoundObject]:
    """Find every object.

    Args:
        image: uint8 (H, W, 3) or a PIL image in RGB, sRGB. Made for scenes of 64 to 1024 pixels; sides above 256 are
            reduced first.
        min_score: in [0, 1]; a patch that no shape explains at least this well is left out.

    Returns:
        The objects, best score first.

    Raises:
        ValueError: if the image is not uint8 (H, W, 3) with sides of at least 16.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or min(image.shape[:2]) < 16:
        raise ValueError(f"image must be uint8 (H, W, 3) with H, W >= 16, got {image.dtype} {image.shape}")
    pixels = _reduce(image).astype(np.float32)
    height, width, _ = pixels.shape
    segmentation = segment(pixels)
    min_area = max(_MIN_PIXELS, round(_MIN_AREA * height * width))
    found: list[FoundObject] = []
    for component in connected_components(segmentation.labels, min_area=min_area):
        top, left = max(component.top - _MARGIN, 0), max(component.left - _MARGIN, 0)
        for pose in _explain(segmentation, component, top, left, min_area):
            if pose.score < min_score:
                continue
            colour = _colour(pixels, segmentation, component, pose, top, left)
            if colour is not None:
                side = max(height, width)
                cx, cy, diameter = (pose.cx + left) / side, (pose.cy + top) / side, 2 * pose.radius / side
                found.append(FoundObject(pose.shape, colour, cx, cy, diameter, pose.score))
    return sorted(found, key=lambda f: (-f.score, f.cx, f.cy))


def _reduce(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    height, width, _ = image.shape
    longer = max(height, width)
    if longer <= _WORKING_SIZE:
        return image
    size = (max(round(width * _WORKING_SIZE / longer), 1), max(round(height * _WORKING_SIZE / longer), 1))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))


def _window(component: Component, top: int, left: int) -> tuple[slice, slice]:
    height, width = component.mask.shape
    bottom, right = component.top + height + _MARGIN, component.left + width + _MARGIN
    return slice(top, bottom), slice(left, right)


def _explain(segmentation: Segmentation, component: Component, top: int, left: int, min_area: int) -> list[Pose]:
    """One shape, or several that touch, in the pixels of the component's window."""
    window = _window(component, top, left)
    labels, nearest = segmentation.labels[window], segmentation.nearest[window]
    mask = np.zeros(labels.shape, np.bool_)
    height, width = component.mask.shape
    inner = (slice(component.top - top, component.top - top + height), slice(component.left - left, None))
    mask[inner][:, :width] = component.mask
    ours = nearest == component.label
    # Another object of this colour inside the window is as unknown as one of another colour.
    foreign = (labels >= 0) & ~mask
    alpha = np.where(ours & ~foreign, segmentation.alpha[window], np.float32(0))
    # An object may be paler than its palette colour; its inside is fully covered all the same.
    level = np.percentile(alpha[mask], _SOLID_PERCENTILE)
    alpha = np.minimum(alpha / np.float32(level), np.float32(1))
    patch = Patch(alpha, (~foreign).astype(np.float32))
    single = best_fit(patch)
    if single.score >= _SINGLE_IS_FINE:
        return [single]
    parts, iou = split_fit(patch, mask, min_area=min_area)
    if iou > single.iou + _SPLIT_GAIN and min(p.score for p in parts) >= MIN_SCORE:
        return parts
    return [single]


def _colour(
    pixels: Field, segmentation: Segmentation, component: Component, pose: Pose, top: int, left: int
) -> Colour | None:
    """Nearest palette colour of the object's inside; None if the inside has no palette colour."""
    window = _window(component, top, left)
    labels = segmentation.labels[window]
    drawn = pose.coverage(*labels.shape)
    inside = np.where(labels == component.label, drawn, np.float32(0))
    solid = np.where(inside > 0.99, inside, np.float32(0))
    weight: Field = solid if solid.sum() >= 4 else inside
    if weight.sum() <= 0:
        return COLOUR_NAMES[component.label]
    colour, distance = mean_colour(pixels[window], weight)
    return colour if distance <= _MAX_COLOUR_DISTANCE else None
