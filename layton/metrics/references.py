"""Two references that every reconstruction is measured against, on the same images.

- `Palette`: what 256 *unlearned* tokens can do: the mean colour of each cell of a 16x16 grid, one of at most 16,384
  colours, enlarged bicubically.
- `PatchPCA`: what a *linear* autoencoder with as many numbers as the latent can do (unquantised): f = 16, 16 channels.

Both are fitted on images and say on which: fitted on the evaluated images themselves, the references are at their
strongest. On several ranks they are fitted on the images of all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol as Interface

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

from layton.ranks import all_gather_rows, all_reduce_sum

GRID = 16
MAX_COLOURS = 16_384
MAX_POINTS = 1 << 20
PATCH_SIZE = 16
NUM_COMPONENTS = 16
_CHUNK = 64  # cells compared with all colours at once: 64 x 16,384 float32 = 4 MB stay in the processor's cache


class Reference(Interface):
    """A reconstruction that needs no learned model."""

    @property
    def name(self) -> str:
        """Short name, the key in reports."""
        ...

    @property
    def description(self) -> str:
        """What it is and on what it was fitted, for the protocol."""
        ...

    def reconstruct(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> the same shape and range."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Palette:
    """Mean colours of a grid of cells, drawn from a palette, enlarged bicubically.

    Attributes:
        colours: (K, 3) float32 in [-1, 1].
        grid: Cells on each side.
        fitted_on: In words.
    """

    colours: Tensor
    grid: int = GRID
    fitted_on: str = "the evaluated images"

    @property
    def name(self) -> str:
        """``palette``."""
        return "palette"

    @property
    def description(self) -> str:
        """For the protocol."""
        return (
            f"{self.grid}x{self.grid} cell means, nearest of {len(self.colours)} colours (median cut) fitted on "
            f"{self.fitted_on}, bicubic enlargement, clamped"
        )

    @classmethod
    def fit(
        cls,
        batches: Iterable[Tensor],
        *,
        grid: int = GRID,
        max_colours: int = MAX_COLOURS,
        fitted_on: str = "the evaluated images",
    ) -> Palette:
        """Chooses the colours for images (B, 3, H, W) in [-1, 1].

        Every different cell mean becomes a colour when there are at most ``max_colours``; else median cut chooses, of
        more than ``MAX_POINTS`` different ones by so many of them, the same in whatever order images come.

        Raises:
            ValueError: There are no images, or ``max_colours`` is less than 1.
        """
        points = torch.zeros(0, 3)
        for images in batches:
            cells = rearrange(cell_means(images, grid), "b c h w -> (b h w) c").cpu()
            points = torch.cat([points, cells])
            if len(points) > 2 * MAX_POINTS:
                points = _some(points)
        points = _some(all_gather_rows(_some(points)))
        if not len(points):
            raise ValueError("no images to choose a palette from")
        return cls(choose_colours(points, max_colours), grid, fitted_on)

    def encode(self, images: Tensor) -> Tensor:
        """Index of the colour of each cell: (B, 3, H, W) -> (B, grid * grid) int64, row-major."""
        cells = rearrange(cell_means(images, self.grid), "b c h w -> (b h w) c")
        colours = self.colours.to(images.device)
        half_norms = colours.square().sum(1) / 2
        # |p - c|^2 / 2 without |p|^2 / 2
        nearest = [torch.addmm(half_norms, part, colours.T, alpha=-1).argmin(1) for part in cells.split(_CHUNK)]
        return rearrange(torch.cat(nearest), "(b n) -> b n", b=len(images))

    def reconstruct(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> the same shape and range."""
        chosen = self.colours.to(images.device)[self.encode(images)]
        small = rearrange(chosen, "b (h w) c -> b c h w", h=self.grid)
        return F.interpolate(small, size=images.shape[-2:], mode="bicubic", align_corners=False).clamp(-1, 1)


@dataclass(frozen=True, slots=True, eq=False)
class PatchPCA:
    """Every patch projected on the principal components of patches.

    Attributes:
        mean: (3 * p * p,) mean patch.
        components: (k, 3 * p * p) orthonormal rows, by falling variance.
        patch_size: p, pixels on each side.
        fitted_on: In words.
    """

    mean: Tensor
    components: Tensor
    patch_size: int = PATCH_SIZE
    fitted_on: str = "the evaluated images"

    @property
    def name(self) -> str:
        """``pca``."""
        return "pca"

    @property
    def description(self) -> str:
        """For the protocol."""
        return (
            f"linear PCA of {self.patch_size}x{self.patch_size}x3 patches, {len(self.components)} unquantised numbers "
            f"each, fitted on {self.fitted_on}, clamped"
        )

    @classmethod
    def fit(
        cls,
        batches: Iterable[Tensor],
        *,
        patch_size: int = PATCH_SIZE,
        num_components: int = NUM_COMPONENTS,
        fitted_on: str = "the evaluated images",
    ) -> PatchPCA:
        """Finds the components for images (B, 3, H, W) in [-1, 1]; needs memory for (3 p p)^2 numbers only.

        Raises:
            ValueError: There are no images, their sides are not multiples of ``patch_size``, or ``num_components`` is
                not in [1, 3 p p].
        """
        size = 3 * patch_size**2
        if not 1 <= num_components <= size:
            raise ValueError(f"num_components must lie in [1, {size}], got {num_components}")
        count, total, outer = 0, torch.zeros(size, dtype=torch.float64), torch.zeros(size, size, dtype=torch.float64)
        for images in batches:
            patches = rearrange(_patches(images, patch_size), "b n d -> (b n) d").cpu().double()
            count += len(patches)
            total += patches.sum(0)
            outer += patches.T @ patches
        count = int(all_reduce_sum(torch.tensor(count)))
        if count == 0:
            raise ValueError("no images to fit the components on")
        mean, outer = all_reduce_sum(total) / count, all_reduce_sum(outer)
        vectors = torch.linalg.eigh(outer / count - torch.outer(mean, mean)).eigenvectors
        components = vectors.flip(1)[:, :num_components].T.contiguous()  # eigh sorts by rising eigenvalue
        return cls(mean.float(), components.float(), patch_size, fitted_on)

    def reconstruct(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1], sides multiples of the patch size -> the same shape and range."""
        mean, components = self.mean.to(images.device), self.components.to(images.device)
        numbers = einsum(_patches(images, self.patch_size) - mean, components, "b n d, k d -> b n k")
        patches = einsum(numbers, components, "b n k, k d -> b n d") + mean
        p, height = self.patch_size, images.shape[-2] // self.patch_size
        return rearrange(patches, "b (h w) (c p q) -> b c (h p) (w q)", h=height, p=p, q=p).clamp(-1, 1)


def fit_references(
    batches: Iterable[Tensor], *, num_components: int = NUM_COMPONENTS, fitted_on: str = "the evaluated images"
) -> tuple[Palette, PatchPCA]:
    """Both references with their standard settings; walks through ``batches`` twice.

    Args:
        batches: Images (B, 3, H, W) in [-1, 1]; re-iterable (a list or a loader, not a generator).
        num_components: Numbers per 16x16 patch: the channels of the latent.
        fitted_on: What the images are, in words.

    Raises:
        ValueError: ``batches`` can be walked through only once, or is empty.
    """
    require_reiterable(batches)
    return (
        Palette.fit(batches, fitted_on=fitted_on),
        PatchPCA.fit(batches, num_components=num_components, fitted_on=fitted_on),
    )


def require_reiterable(batches: Iterable[object]) -> None:
    """Refuses iterators, which are empty at the second walk.

    Raises:
        ValueError: ``batches`` is an iterator.
    """
    if iter(batches) is batches:
        raise ValueError(f"batches are walked through twice: give a list or a loader, not a {type(batches).__name__}")


def cell_means(images: Tensor, grid: int) -> Tensor:
    """Mean colour of each cell of a grid over the image: (B, 3, H, W) -> (B, 3, grid, grid)."""
    return F.adaptive_avg_pool2d(images.float(), grid)


def choose_colours(points: Tensor, max_colours: int) -> Tensor:
    """At most ``max_colours`` colours for points: all different ones if they fit, else median cut (Heckbert 1982).

    Median cut halves every box across its longest side at the median point until the next round would make too many;
    a colour is the mean of its box. With 16,384 colours `Palette` loses 0.01 dB against unlimited ones, on photographs
    and on Scenes.

    Args:
        points: (n, 3).
        max_colours: At least 1.

    Returns:
        (K, 3), K <= max_colours.

    Raises:
        ValueError: ``max_colours`` is less than 1 or there are no points.
    """
    if max_colours < 1 or len(points) == 0:
        raise ValueError(f"need points and max_colours >= 1, got {len(points)} points and {max_colours}")
    different = points.unique(dim=0)
    if len(different) <= max_colours:
        return different
    boxes = [different]
    while 2 * len(boxes) <= max_colours:
        boxes = [half for box in boxes for half in _halves(box)]
    return torch.stack([box.mean(0) for box in boxes])


def _some(points: Tensor) -> Tensor:
    """The different ones of points (n, 3), or ``MAX_POINTS`` of them: those whose bits mix to the smallest numbers."""
    different = points.unique(dim=0)
    if len(different) <= MAX_POINTS:
        return different
    red, green, blue = different.contiguous().view(torch.int32).long().unbind(1)
    mixed = (red * 73_856_093) ^ (green * 19_349_663) ^ (blue * 83_492_791)
    mixed = (mixed ^ (mixed >> 15)) * 2_654_435_761 % 2**31
    return different[mixed.argsort(stable=True)[:MAX_POINTS].sort().values]


def _halves(box: Tensor) -> Sequence[Tensor]:
    if len(box) < 2:
        return [box]
    axis = int((box.amax(0) - box.amin(0)).argmax())
    ordered = box[box[:, axis].argsort(stable=True)]
    return ordered.tensor_split(2)


def _patches(images: Tensor, size: int) -> Tensor:
    """(B, 3, H, W) -> (B, patches, 3 * size * size), row-major."""
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[-2] % size or images.shape[-1] % size:
        raise ValueError(
            f"expected images (B, 3, H, W) with sides that are multiples of {size}, got {tuple(images.shape)}"
        )
    return rearrange(images.float(), "b c (h p) (w q) -> b (h w) (c p q)", p=size, q=size)
