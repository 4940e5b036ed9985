"""Opening image files that nobody has checked, and the borders between files, tensors and squares.

Stated policies: JPEG, PNG and WebP only, recognised by content; sizes are refused from the header, before decoding; a
cut-off file is an error, never a partly grey picture; EXIF orientation is applied; colours are brought to sRGB when the
file carries another profile; transparency is composited on a stated colour (white); 16-bit values are scaled to 8 bits;
of an animation the first frame is taken.
"""

from __future__ import annotations

import functools
import io
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageCms, ImageFile
from torch import Tensor

from layton.data.geometry import FIT_POLICIES, FitPolicy, Geometry, fit_image
from layton.data.headers import ImageHeader, read_header
from layton.quiet import Unwarned

__all__ = [
    "DEFAULT_LIMITS",
    "FIT_POLICIES",
    "WHITE",
    "FitPolicy",
    "Geometry",
    "ImageError",
    "ImageLimits",
    "fit_image",
    "load_image",
    "load_tensor",
    "plain_rgb",
    "to_image",
    "to_tensor",
]

WHITE = (255, 255, 255)
_ORIENTATION_TAG = 0x0112
_TRANSPOSE: Mapping[int, Image.Transpose] = MappingProxyType(
    {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
)
_UNWARNED = Unwarned()
# What the decoders are known to raise on damaged input; anything else is a bug and must be seen.
_DECODE_ERRORS = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, OverflowError),
    *(struct.error, zlib.error),
)


class ImageError(ValueError):
    """An image was refused or is broken; the message is one line that names the file and the reason."""


SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
"""What files in folders are called that are read."""
UNREAD_SUFFIXES = frozenset(
    {
        ".avif",
        ".bmp",
        ".gif",
        ".heic",
        ".heif",
        ".jp2",
        ".jpe",
        ".jfif",
        ".jxl",
        ".tif",
        ".tiff",
        ".tga",
        ".ppm",
        ".psd",
    }
)
"""Pictures of other kinds, which are named and passed over."""


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What an image file may ask for. Larger files are refused before they are decoded.

    Attributes:
        max_bytes: Size of the file.
        max_pixels: Width times height.
        max_side: The longer side in pixels.
    """

    max_bytes: int = 64 * 2**20
    max_pixels: int = 64_000_000
    max_side: int = 16_384

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_pixels", "max_side"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")

    def check_size(self, *, width: int, height: int) -> None:
        """Refuse an image of these many pixels if it is too large.

        Raises:
            ValueError: If it is.
        """
        if max(width, height) > self.max_side or width * height > self.max_pixels:
            raise ValueError(
                f"{width}x{height} pixels, more than the allowed {self.max_pixels} or a side over {self.max_side}"
            )


DEFAULT_LIMITS = ImageLimits()


def load_image(
    source: Path | str | bytes,
    *,
    name: str | None = None,
    limits: ImageLimits = DEFAULT_LIMITS,
    background: tuple[int, int, int] = WHITE,
) -> Image.Image:
    """Open and decode an untrusted image.

    Args:
        source: Path of a file, or the bytes of one.
        name: What to call it in messages; the path by default.
        limits: What is refused from the header.
        background: RGB colour, 0 to 255, on which transparent images are composited.

    Returns:
        An upright image of mode "RGB".

    Raises:
        ImageError: If it cannot be read, is no JPEG, PNG or WebP, is beyond the limits, cut off or damaged.
    """
    name = name if name is not None else ("image" if isinstance(source, bytes) else str(source))
    data = source if isinstance(source, bytes) else _read_file(Path(source), name, limits)
    if len(data) > limits.max_bytes:
        raise ImageError(f"{name}: {len(data)} bytes, more than the {limits.max_bytes} allowed")
    try:
        header = read_header(data)
    except ValueError as error:
        raise ImageError(f"{name}: {error}") from error
    _check_size(header, name, limits)
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise RuntimeError("PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set: cut-off images would be read as partly grey")
    try:
        # damaged metadata is not worth a warning; damaged pixels raise
        with _UNWARNED, Image.open(io.BytesIO(data), formats=(header.format,)) as image:
            if image.size != (header.width, header.height):
                raise ImageError(f"{name}: contradictory sizes in the header")
            image.load()
            return _upright_rgb(image, header, background)
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError(f"{name}: not enough memory to decode it") from error
    except _DECODE_ERRORS as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ImageError(f"{name}: broken {header.format} file ({reason})") from error


def plain_rgb(image: Image.Image, *, background: tuple[int, int, int] = WHITE) -> Image.Image:
    """A decoded image of any mode as `load_image` gives it: upright, sRGB, on a background, of 8 bits.

    Args:
        image: As PIL opened or made it.
        background: RGB colour, 0 to 255, on which transparent images are composited.

    Returns:
        A new image of mode "RGB".
    """
    return _upright_rgb(image, None, background)


def load_tensor(
    source: Path | str | bytes,
    *,
    size: int,
    policy: FitPolicy = "crop",
    name: str | None = None,
    limits: ImageLimits = DEFAULT_LIMITS,
) -> tuple[Tensor, Geometry]:
    """Open an untrusted image and fit it to a square.

    Args:
        source: Path of a file, or the bytes of one.
        size: Side of the square in pixels.
        policy: How other shapes become square.
        name: What to call it in messages.
        limits: What is refused from the header.

    Returns:
        The image (3, size, size) in [-1, 1], and the geometry that undoes the fit.

    Raises:
        ImageError: As `load_image`.
    """
    square, geometry = fit_image(load_image(source, name=name, limits=limits), size, policy=policy)
    return to_tensor(square), geometry


def to_tensor(image: Image.Image) -> Tensor:
    """Image of mode "RGB" to float32 (3, H, W) in [-1, 1].

    Args:
        image: Decoded image.

    Raises:
        ValueError: If the mode is not "RGB" (conversions are `load_image`'s task).
    """
    if image.mode != "RGB":
        raise ValueError(f"to_tensor needs an RGB image, got mode {image.mode!r}")
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return rearrange(pixels, "h w c -> c h w").contiguous().to(torch.float32).div_(127.5).sub_(1.0)


def tell_unread(folder: Path, kinds: Mapping[str, int]) -> None:
    """Warn of pictures in a folder that nothing here reads, which would be missed without a word.

    Args:
        folder: Where they are.
        kinds: How many there are of each suffix of `UNREAD_SUFFIXES`.
    """
    if kinds:
        warnings.warn(
            f"{folder}: {sum(kinds.values())} files of other kinds ({', '.join(sorted(kinds))}) are not read: pictures "
            "are .jpg, .jpeg, .png and .webp",
            stacklevel=3,
        )


def to_image(image: Tensor) -> Image.Image:
    """Tensor (3, H, W) in [-1, 1] to an "RGB" image; values outside are clipped. Inverse of `to_tensor`.

    Args:
        image: (3, H, W), any floating type and device.

    Raises:
        ValueError: If the shape is another or a value is not finite.
    """
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"to_image needs a tensor (3, H, W), got shape {tuple(image.shape)}")
    image = image.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(image).all()):
        raise ValueError("to_image got values that are not finite")
    pixels = ((image + 1.0) * 127.5).round().clamp(0.0, 255.0).to(torch.uint8)
    return Image.fromarray(rearrange(pixels, "c h w -> h w c").contiguous().numpy())


def _read_file(path: Path, name: str, limits: ImageLimits) -> bytes:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # a pipe would block, a device never end
            raise ImageError(f"{name}: not a regular file")
        if status.st_size > limits.max_bytes:
            raise ImageError(f"{name}: {status.st_size} bytes, more than the {limits.max_bytes} allowed")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def _check_size(header: ImageHeader, name: str, limits: ImageLimits) -> None:
    width, height = header.width, header.height
    if width < 1 or height < 1:
        raise ImageError(f"{name}: header says {width}x{height} pixels")
    try:
        limits.check_size(width=width, height=height)
    except ValueError as error:
        raise ImageError(f"{name}: {error}") from error


def _upright_rgb(image: Image.Image, header: ImageHeader | None, background: tuple[int, int, int]) -> Image.Image:
    orientation = _orientation(image)
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I"):
        image = _from_16_bit(image)
    elif "transparency" in image.info and header is not None and header.format == "PNG":
        _rescale_transparency(image, header)
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        colours = _to_srgb(rgba.convert("RGB"), profile)
        image = Image.new("RGB", image.size, background)
        image.paste(colours, mask=rgba.getchannel("A"))
    else:
        image = _to_srgb(image, profile)
    if orientation in _TRANSPOSE:
        image = image.transpose(_TRANSPOSE[orientation])
    image.info.clear()  # of this copy: what was said of turns, colours and transparency is done
    return image


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except (*_DECODE_ERRORS, AttributeError):
        return 1  # unreadable EXIF says nothing about the pixels


def _from_16_bit(image: Image.Image) -> Image.Image:
    """16-bit grey to "L", or "LA" when one grey value is declared transparent."""
    values = np.asarray(image).astype(np.int64)
    grey = Image.fromarray(((values.clip(0, 65535) + 128) // 257).astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


def _rescale_transparency(image: Image.Image, header: ImageHeader) -> None:
    """The transparent colour of a PNG is stored at the file's bit depth; bring it to that of the decoded pixels."""
    clear = image.info["transparency"]
    if header.bit_depth == 16 and isinstance(clear, tuple):
        image.info["transparency"] = tuple(int(value) >> 8 for value in clear)
    elif header.grey and header.bit_depth < 8 and isinstance(clear, int) and image.mode == "L":
        image.info["transparency"] = clear * 255 // (2**header.bit_depth - 1)


def _to_srgb(image: Image.Image, profile: object) -> Image.Image:
    if image.mode == "P":
        image = image.convert("RGB")  # the colours of a palette are as the profile says, too
    if isinstance(profile, bytes) and profile and image.mode in ("RGB", "CMYK"):
        transform = _srgb_transform(profile, image.mode)
        if transform is not None:
            converted = ImageCms.applyTransform(image, transform)
            if converted is not None:
                return converted
    return image.convert("RGB")


@functools.lru_cache(maxsize=16)
def _srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Transform of a colour profile to sRGB; None when it is sRGB already, of another colour space, or damaged."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != mode or "sRGB" in ImageCms.getProfileDescription(source):
            return None
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (OSError, ValueError, TypeError, ImageCms.PyCMSError):
        return None
