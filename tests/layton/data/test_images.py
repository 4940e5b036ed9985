from __future__ import annotations

import io
import os
import struct
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageFile, PngImagePlugin

from layton.data.images import ImageError, ImageLimits, load_image, load_tensor, to_image, to_tensor


def pixels(image):
    return np.asarray(image).astype(int)


def png_chunk(kind, payload):
    return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", zlib.crc32(kind + payload))


def raw_png(width, height, depth, colour, rows=b"", extra=()):
    """A PNG written chunk by chunk, so that its header can lie."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = [png_chunk(b"IHDR", header), *(png_chunk(*chunk) for chunk in extra)]
    return b"\x89PNG\r\n\x1a\n" + b"".join([*chunks, png_chunk(b"IDAT", zlib.compress(rows)), png_chunk(b"IEND", b"")])


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options"), [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {})]
)
def test_an_image_cut_off_anywhere_is_refused_and_never_partly_grey(kit, kind, options):
    data = kit.encode(kit.smooth_image(1, (64, 48)), kind, **options)
    whole = pixels(load_image(data))
    for end in np.linspace(0, len(data) - 3, 50).astype(int):
        start = time.perf_counter()
        try:
            image = load_image(data[:end], name="cut")
        except ImageError as error:
            assert str(error).startswith("cut: ") and "\n" not in str(error)
        else:  # only padding after the last pixel may go
            assert (pixels(image) == whole).all()
            pytest.fail(f"cut at {end} of {len(data)} was read")
        assert time.perf_counter() - start < 0.2


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<html><body>404</body></html>",
        b"%PDF-1.7 ...",
        b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        b"SIMPLE  =                    T" + bytes(2880),
        b"GIF89a\x01\x00\x01\x00\x00\x00\x00;",
        b"BM" + bytes(60),
        b"II*\x00" + bytes(60),
        b"\xff\xd8\xff",
        b"RIFF\x00\x00\x00\x00WEBP",
        bytes(1000),
    ],
)
def test_other_formats_named_jpg_are_refused_by_content(tmp_path, data):
    path = tmp_path / "x.jpg"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=r"x\.jpg: "):
        load_image(path)


def test_what_is_not_a_readable_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    for name in ("missing.jpg", "pipe.jpg", "."):
        with pytest.raises(ImageError, match=r"cannot be read|not a regular file"):
            load_image(tmp_path / name)
    with pytest.raises(ImageError, match="cannot be read"):
        load_image("a\0b.jpg")


def resident_kib():
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in line).split()[1])


def bombs(kit):
    jpeg = kit.encode(kit.smooth_image(), "JPEG")
    big_text = zlib.compress(bytes(64 * 2**20))
    return {
        "100 megapixels": raw_png(10_000, 10_000, 8, 2, bytes(1000)),
        "178 megapixels": raw_png(13_350, 13_350, 8, 2, bytes(1000)),
        "strip": raw_png(1, 2**20, 8, 2, bytes(1000)),
        "zTXt": raw_png(4, 4, 8, 0, bytes(20), [(b"zTXt", b"Comment\0\0" + big_text)]),
        "iTXt": raw_png(4, 4, 8, 0, bytes(20), [(b"iTXt", b"Comment\0\x01\0en\0k\0" + big_text)]),
        "iCCP": raw_png(4, 4, 8, 0, bytes(20), [(b"iCCP", b"profile\0\0" + big_text)]),
        "VP8X": b"RIFF"
        + struct.pack("<I", 40)
        + b"WEBPVP8X"
        + struct.pack("<I", 10)
        + bytes(4)
        + b"\xff" * 6
        + bytes(18),
        "VP8L": b"RIFF"
        + struct.pack("<I", 40)
        + b"WEBPVP8L"
        + struct.pack("<I", 10)
        + b"\x2f"
        + b"\xff" * 4
        + bytes(23),
        "scans": jpeg[:-2] + b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00\x12" * 300 + jpeg[-2:],
    }


def test_what_follows_a_jpeg_or_lies_in_its_segments_is_no_scan(kit):
    jpeg = kit.encode(kit.smooth_image(), "JPEG")
    film = jpeg + b"\xff\xda\x00\x08" * 10_000  # a phone's motion photo
    thumbnail = jpeg[:2] + b"\xff\xe5\x10\x00" + (b"\xff\xda" * 2047) + jpeg[2:]
    for data in (film, thumbnail):
        assert load_image(data).tobytes() == load_image(jpeg).tobytes()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_bombs_are_refused_from_the_header_before_decoding(kit):
    for name, data in bombs(kit).items():
        before, start = resident_kib(), time.perf_counter()
        with pytest.raises(ImageError, match=f"{name}: .*(more than|side over)"):
            load_image(data, name=name)
        assert time.perf_counter() - start < 0.2
        assert resident_kib() - before < 32 * 1024


def test_limits_count_bytes_pixels_and_sides(kit, tmp_path):
    data = kit.encode(kit.smooth_image(0, (40, 30)), "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(data)
    assert load_image(path, limits=ImageLimits(len(data), 1200, 40)).size == (40, 30)
    for limits in (ImageLimits(max_bytes=len(data) - 1), ImageLimits(max_pixels=1199), ImageLimits(max_side=39)):
        for source in (path, data):
            with pytest.raises(ImageError, match="more than"):
                load_image(source, limits=limits)
    with pytest.raises(ValueError, match="max_side must be >= 1, got 0"):
        ImageLimits(max_side=0)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_bytes_give_an_image_or_an_image_error_and_nothing_else(data):
    image = Image.linear_gradient("L").resize((24, 16)).convert("RGB")
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP"]))
    buffer = io.BytesIO()
    image.save(buffer, kind)
    broken = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert load_image(bytes(broken)).mode == "RGB"
    except ImageError as error:
        assert "\n" not in str(error)


def test_a_process_that_allows_truncated_images_is_told(kit, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(RuntimeError, match="LOAD_TRUNCATED_IMAGES"):
        load_image(kit.encode(kit.smooth_image()))


# -- what is read, and how --------------------------------------------------------------------------------------------

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def ramp_rgb():
    return np.stack([RAMP, RAMP.T, 255 - RAMP], axis=-1)


def on_white(rgb, alpha):
    alpha = alpha[..., None] / 255
    return rgb * alpha + 255 * (1 - alpha)


def grey(values):
    return np.repeat(values[..., None].astype(float), 3, axis=-1)


def palette_png(transparent):
    image = Image.fromarray(RAMP).convert("P")
    image.putpalette([v for i in range(256) for v in (i, 255 - i, i // 2)])
    return image, ({"transparency": transparent} if transparent is not None else {})


def colour_fixtures(kit):
    rgb, values16 = ramp_rgb(), (RAMP.astype(np.uint16) * 257 // 2 + 1000)
    palette = np.stack([RAMP, 255 - RAMP, RAMP // 2], axis=-1)
    rgba = Image.fromarray(np.dstack([rgb, RAMP.T]))
    la = Image.merge("LA", [Image.fromarray(RAMP), Image.fromarray(RAMP.T.copy())])
    p, options = palette_png(bytes(range(256)))
    wide = rgb.astype(np.uint16) * 257
    rows16 = b"".join(b"\0" + row.astype(">u2").tobytes() for row in wide)
    cmyk = Image.fromarray(rgb).convert("CMYK")
    return {
        "RGB png": (kit.encode(Image.fromarray(rgb), "PNG"), rgb),
        "RGB lossless webp": (kit.encode(Image.fromarray(rgb), "WEBP", lossless=True), rgb),
        "L": (kit.encode(Image.fromarray(RAMP), "PNG"), grey(RAMP)),
        "1": (kit.encode(Image.fromarray(RAMP > 100), "PNG"), grey((RAMP > 100) * 255)),
        "LA": (kit.encode(la, "PNG"), on_white(grey(RAMP), RAMP.T)),
        "RGBA png": (kit.encode(rgba, "PNG"), on_white(rgb, RAMP.T)),
        "RGBA webp": (kit.encode(rgba, "WEBP", lossless=True, exact=True), on_white(rgb, RAMP.T)),
        "P": (kit.encode(palette_png(None)[0], "PNG"), palette),
        "P with tRNS": (kit.encode(p, "PNG", **options), on_white(palette, RAMP)),
        "L with tRNS": (kit.encode(Image.fromarray(RAMP), "PNG", transparency=0), grey(np.where(RAMP == 0, 255, RAMP))),
        "2-bit grey with tRNS": (
            raw_png(4, 1, 2, 0, b"\0\x1b", [(b"tRNS", b"\0\1")]),
            grey(np.array([[0, 255, 170, 255]])),
        ),
        "16-bit grey": (kit.encode(Image.fromarray(values16), "PNG"), grey(values16 / 257)),
        "16-bit grey with tRNS": (
            raw_png(3, 1, 16, 0, b"\0\0\0\x80\0\xff\xff", [(b"tRNS", b"\0\0")]),
            grey(np.array([[255, 127.5, 255]])),
        ),
        "16-bit RGB": (raw_png(16, 16, 16, 2, rows16), rgb),
        "16-bit RGB with tRNS": (
            raw_png(2, 1, 16, 2, b"\0" + b"\x10\x10" * 3 + b"\x80\x80" * 3, [(b"tRNS", b"\x10\x10" * 3)]),
            grey(np.array([[255, 128]])),
        ),
        "16-bit RGBA": (raw_png(1, 1, 16, 6, b"\0" + b"\xff\xff\0\0\0\0\x80\0"), np.array([[[255, 127.5, 127.5]]])),
        "CMYK": (kit.encode(cmyk, "JPEG", quality=100, subsampling=0), rgb),
        "L jpeg": (kit.encode(Image.fromarray(RAMP), "JPEG", quality=100), grey(RAMP)),
    }


def test_every_colour_layout_matches_its_reference(kit):
    for name, (data, expected) in colour_fixtures(kit).items():
        image = load_image(data)
        assert image.mode == "RGB", name
        error = np.abs(pixels(image) - expected).max()
        assert error <= (4 if "CMYK" in name else 2), f"{name}: {error}"


def test_transparency_is_composited_on_the_stated_colour():
    image = Image.new("RGBA", (2, 2), (200, 10, 10, 0))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    assert load_image(buffer.getvalue()).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(buffer.getvalue(), background=(1, 2, 3)).getpixel((0, 0)) == (1, 2, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_exactly(kit, kind, orientation):
    stored = kit.smooth_image(3, (32, 24))
    exif = Image.Exif()
    exif[0x0112] = orientation
    plain = load_image(kit.encode(stored, kind))
    turned = load_image(kit.encode(stored, kind, exif=exif))
    array = pixels(plain)
    expected = {  # EXIF 2.32, table of orientations: where row 0 and column 0 of the stored image are shown
        1: array,
        2: array[:, ::-1],
        3: array[::-1, ::-1],
        4: array[::-1],
        5: array.transpose(1, 0, 2),
        6: np.rot90(array, -1),
        7: np.rot90(array.transpose(1, 0, 2), 2),
        8: np.rot90(array, 1),
    }[orientation]
    assert (pixels(turned) == expected).all()


def test_damaged_exif_is_no_reason_to_refuse_good_pixels(kit):
    image = kit.smooth_image(4)
    data = kit.encode(image, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + bytes(30))
    assert (pixels(load_image(data)) == pixels(load_image(kit.encode(image, "JPEG")))).all()


def test_colours_of_another_profile_are_brought_to_srgb_and_srgb_is_left_alone(kit):
    image = kit.smooth_image(5)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert (pixels(load_image(kit.encode(image, "PNG", icc_profile=srgb))) == pixels(image)).all()
    assert (pixels(load_image(kit.encode(image, "PNG", icc_profile=b"junk" * 50))) == pixels(image)).all()
    # The same profile with its first colourant's tag swapped with the third's shows red as blue.
    swapped = srgb.replace(b"rXYZ", b"tmpp", 1).replace(b"bXYZ", b"rXYZ", 1).replace(b"tmpp", b"bXYZ", 1)
    swapped = swapped.replace("sRGB".encode("utf-16-be"), "wRGB".encode("utf-16-be"))
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    shown = load_image(kit.encode(red, "PNG", icc_profile=swapped)).getpixel((0, 0))
    assert shown[2] > 200 and shown[0] < 60
    assert load_image(kit.encode(red.convert("P"), "PNG", icc_profile=swapped)).getpixel((0, 0)) == shown


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_taken(kit, kind):
    first, second = Image.new("RGB", (8, 8), (250, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 250))
    data = kit.encode(first, kind, save_all=True, append_images=[second], duration=50, lossless=True)
    assert np.abs(pixels(load_image(data)) - [250, 0, 0]).max() <= 2


def test_large_text_in_a_png_that_is_not_a_bomb_is_accepted(kit):
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 200_000, zip=True)
    assert load_image(kit.encode(kit.smooth_image(), "PNG", pnginfo=info)).size == (48, 40)


# -- tensors ----------------------------------------------------------------------------------------------------------


def test_image_to_tensor_and_back_is_exact():
    image = Image.fromarray(ramp_rgb())
    tensor = to_tensor(image)
    assert tensor.dtype == torch.float32 and tensor.shape == (3, 16, 16)
    assert tensor.min() == -1 and tensor.max() == 1
    assert (pixels(to_image(tensor)) == pixels(image)).all()


def test_values_outside_are_clipped_and_nonsense_is_refused():
    assert to_image(torch.full((3, 2, 2), 7.0)).getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(ValueError, match="not finite"):
        to_image(torch.full((3, 2, 2), float("nan")))
    with pytest.raises(ValueError, match=r"\(1, 2, 2\)"):
        to_image(torch.zeros(1, 2, 2))
    with pytest.raises(ValueError, match="mode 'L'"):
        to_tensor(Image.new("L", (2, 2)))


def test_load_tensor_fits_and_tells_how(kit):
    tensor, geometry = load_tensor(kit.encode(kit.smooth_image(0, (40, 20))), size=16, policy="pad")
    assert tensor.shape == (3, 16, 16) and geometry.original_size == (20, 40) and geometry.box == (0, 4, 16, 12)


def test_threads_that_read_leave_the_filters_of_warnings_as_they_were() -> None:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "PNG")
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: load_image(file.getvalue()), range(400)))
    assert warnings.filters == before
