"""Format, size and hidden expansions of an image file, read from its header before any decoder sees it.

Only JPEG, PNG and WebP are known here, by content and never by file name: every other decoder of the imaging library
is unused attack surface. Sources: ITU-T T.81 (JPEG markers), W3C PNG third edition, RFC 9649 (WebP container).
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

ImageFormat = Literal["JPEG", "PNG", "WEBP"]

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_SOF_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # start of frame, without DHT, JPG and DAC
_BARE_MARKERS = frozenset({0x01, *range(0xD0, 0xD8)})  # markers without a length
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]", re.DOTALL)
_MAX_SCANS = 256  # a progressive file has about ten; thousands make a small file take minutes
_MAX_EXPANDED = 2 * 2**20  # bytes that all compressed text and colour profiles of one PNG may expand to
_MAX_CHUNKS = 100_000


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What the first bytes of a file promise.

    Attributes:
        format: "JPEG", "PNG" or "WEBP".
        width: Pixels, before any EXIF rotation.
        height: Pixels, before any EXIF rotation.
        bit_depth: Bits per channel.
        grey: Whether a PNG stores grey values; False for the other formats.
    """

    format: ImageFormat
    width: int
    height: int
    bit_depth: int = 8
    grey: bool = False


def read_header(data: bytes) -> ImageHeader:
    """Read the header of an image file without decoding it.

    Args:
        data: The whole file.

    Raises:
        ValueError: If the file is not JPEG, PNG or WebP, is cut off inside its header, or hides a bomb.
    """
    if not data:
        raise ValueError("the file is empty")
    if data.startswith(b"\xff\xd8\xff"):
        return _jpeg_header(data)
    if data.startswith(_PNG_MAGIC):
        return _png_header(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp_header(data)
    raise ValueError("not a JPEG, PNG or WebP file")


def _jpeg_header(data: bytes) -> ImageHeader:
    if _jpeg_scans(data) > _MAX_SCANS:
        raise ValueError(f"JPEG with more than {_MAX_SCANS} scans")
    position = 2
    while position + 4 <= len(data):
        if data[position] != 0xFF:
            raise ValueError(f"JPEG marker expected at byte {position}")
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
        elif marker in _BARE_MARKERS:
            position += 2
        elif marker in _SOF_MARKERS:
            frame = data[position + 4 : position + 9]
            if len(frame) < 5:
                break
            return ImageHeader(
                "JPEG", int.from_bytes(frame[3:5], "big"), int.from_bytes(frame[1:3], "big"), bit_depth=frame[0]
            )
        elif marker in (0xD9, 0xDA):
            raise ValueError("JPEG without a frame header")
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    raise ValueError("JPEG cut off inside its header")


def _jpeg_scans(data: bytes) -> int:
    """Scans up to the end of the image, of which no more than one too many are counted.

    What follows the end (a phone's film) is not looked at, nor what segments hold (thumbnails). Inside entropy-coded
    data FF is stuffed, so that the next marker is the next FF with another byte behind it; decoders look for it alike.
    """
    scans, position = 0, 2
    while scans <= _MAX_SCANS and (found := _JPEG_MARKER.search(data, position)) is not None:
        marker, position = data[found.start() + 1], found.end()
        if marker == 0xD9:
            break
        scans += marker == 0xDA
        if marker not in _BARE_MARKERS:
            position += int.from_bytes(data[position : position + 2], "big")
    return scans


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield (type, payload) of the chunks that matter; pixel data is passed over, not copied."""
    position = len(_PNG_MAGIC)
    for _ in range(_MAX_CHUNKS):
        head = data[position : position + 8]
        if len(head) < 8:
            raise ValueError("PNG cut off: no end chunk")
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        end = position + 12 + length
        if end > len(data):
            raise ValueError(f"PNG cut off inside chunk {kind!r}")
        yield kind, data[position + 8 : end - 4] if kind in (b"IHDR", b"iCCP", b"zTXt", b"iTXt") else b""
        if kind == b"IEND":
            return
        position = end
    raise ValueError(f"PNG with more than {_MAX_CHUNKS} chunks")


def _png_header(data: bytes) -> ImageHeader:
    header: ImageHeader | None = None
    expanded = 0
    for kind, payload in _png_chunks(data):
        if header is None:
            if kind != b"IHDR" or len(payload) != 13:
                raise ValueError("PNG does not begin with its header chunk")
            width, height = int.from_bytes(payload[:4], "big"), int.from_bytes(payload[4:8], "big")
            header = ImageHeader("PNG", width, height, bit_depth=payload[8], grey=payload[9] in (0, 4))
            continue
        expanded += _expanded_size(kind, payload, _MAX_EXPANDED - expanded)
        if expanded > _MAX_EXPANDED:
            raise ValueError(f"PNG whose text or colour profile expands to more than {_MAX_EXPANDED} bytes")
    if header is None:  # unreachable: an empty chunk list already failed
        raise ValueError("PNG without a header chunk")
    return header


def _expanded_size(kind: bytes, payload: bytes, room: int) -> int:
    """Bytes a compressed PNG chunk expands to, counted no further than `room` + 1."""
    _, _, rest = payload.partition(b"\0")
    if kind == b"iTXt":
        if rest[:1] != b"\x01":  # not compressed
            return len(rest)
        _, _, rest = rest[2:].partition(b"\0")  # language
        _, _, packed = rest.partition(b"\0")  # translated keyword
    elif kind in (b"zTXt", b"iCCP"):
        packed = rest[1:]
    else:
        return 0
    try:
        return len(zlib.decompressobj().decompress(packed, max_length=max(room, 0) + 1))
    except zlib.error as error:
        raise ValueError(f"PNG chunk {kind!r} is damaged: {error}") from error


def _webp_header(data: bytes) -> ImageHeader:
    if int.from_bytes(data[4:8], "little") + 8 > len(data):
        raise ValueError("WebP cut off")
    kind, body = data[12:16], data[20:30]
    if len(body) < 10:
        raise ValueError("WebP cut off inside its header")
    if kind == b"VP8X":
        return ImageHeader("WEBP", int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1)
    if kind == b"VP8L" and body[0] == 0x2F:
        bits = int.from_bytes(body[1:5], "little")
        return ImageHeader("WEBP", (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    if kind == b"VP8 " and body[3:6] == b"\x9d\x01\x2a":
        size = int.from_bytes(body[6:10], "little")
        return ImageHeader("WEBP", size & 0x3FFF, size >> 16 & 0x3FFF)
    raise ValueError("WebP with an unknown first chunk")
