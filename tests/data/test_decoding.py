"""Picture files as people have them: right, or refused with the reason."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from unclip_jax.data.decoding import decode, endings, formats, is_picture
from unclip_jax.errors import UnreadableRecord

RAMP = np.arange(64, dtype=np.uint8).reshape(8, 8)


def encoded(picture, kind, **options):
    file = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(file, kind, **options)
    return file.getvalue()


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_program_s_state_within_a_png(zipped):
    """Two megabytes of text, as programs that draw pictures store how they did."""
    texts = PngImagePlugin.PngInfo()
    texts.add_text("workflow", "{} " * 700_000, zip=zipped)
    np.testing.assert_array_equal(decode(encoded(RAMP, "PNG", pnginfo=texts))[..., 1], RAMP)


def test_a_large_colour_profile_within_a_png():
    whole = encoded(RAMP, "PNG")
    profile = chunk(b"iCCP", b"mine\0\0" + zlib.compress(bytes(3_000_000)))
    np.testing.assert_array_equal(decode(whole[:33] + profile + whole[33:])[..., 0], RAMP)


def test_a_damaged_png_stays_one():
    whole = encoded(RAMP, "PNG")
    with pytest.raises(UnreadableRecord):
        decode(whole[:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(3_000_000))) + whole[33:45])


@pytest.mark.parametrize("odd", [b"", b"\0" * 9, b"MM\0*\0\0\0\x08\0\x09", b"II*\0\x08\0\0\0" + b"\xff" * 40])
def test_damaged_exif_leaves_the_pixels_alone(odd):
    data = encoded(RAMP, "JPEG", quality=100, exif=b"Exif\0\0" + odd)
    np.testing.assert_array_equal(decode(data)[..., 0], np.asarray(Image.open(io.BytesIO(data)).convert("L")))


def test_exif_that_pillow_cannot_read(monkeypatch):
    """Older versions raise nearly anything."""

    def fail(_):
        raise SyntaxError("not a TIFF file")

    monkeypatch.setattr(Image.Image, "getexif", fail)
    np.testing.assert_array_equal(decode(encoded(RAMP, "BMP"))[..., 0], RAMP)


@pytest.mark.parametrize("way", range(2, 9))
def test_all_ways_of_holding_a_camera(way):
    """Against Pillow's own turning."""
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = way
    exif[0x010E] = "a description"
    data = encoded(RAMP[:5], "PNG", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(decode(data)[..., 0], np.asarray(upright))


@pytest.mark.parametrize(
    ("mode", "values", "kind"),
    [
        ("I;16", "<u2", "TIFF"),
        ("I;16", "<u2", "PNG"),
        ("I;16B", ">u2", "TIFF"),
        ("I", "<i4", "TIFF"),
        ("I", "<i4", "PPM"),
    ],
)
def test_sixteen_bits_of_all_modes(mode, values, kind):
    levels = np.array([0, 255, 256, 32768, 65535], values)
    picture = Image.frombytes(mode, (5, 1), levels.tobytes())
    found = decode(encoded(picture, kind))
    assert found.shape == (1, 5, 3) and found.dtype == np.uint8
    np.testing.assert_array_equal(found[0, :, 2], [0, 0, 1, 128, 255])


def test_thirty_two_bits():
    levels = np.array([-5, 2**23, 2**30, 2**31 - 1], "<i4")
    data = encoded(Image.frombytes("I", (4, 1), levels.tobytes()), "TIFF")
    np.testing.assert_array_equal(decode(data)[0, :, 0], [0, 1, 128, 255])


@pytest.mark.parametrize("white", [1, 255, 65535])
def test_floats(white):
    levels = np.array([[-0.5, 0, 0.25, 0.5, 1]], np.float32) * np.float32(white)
    np.testing.assert_array_equal(decode(encoded(levels, "TIFF"))[0, :, 0], [0, 0, 64, 128, 255])


@pytest.mark.parametrize(("wrong", "why"), [(np.nan, "not finite"), (np.inf, "not finite"), (1e6, "which of them")])
def test_floats_that_are_no_picture(wrong, why):
    with pytest.raises(UnreadableRecord, match=why):
        decode(encoded(np.array([[0, wrong]], np.float32), "TIFF"))


def test_lab():
    grey = Image.frombytes("LAB", (1, 1), bytes([128, 0, 0]))
    found = decode(encoded(grey, "TIFF"))[0, 0].astype(int)
    np.testing.assert_allclose(found, 119, atol=1)  # L* = 50.2 has luminance 0.186: 119 in sRGB


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "PPM", "TGA", "ICO", "JPEG2000"])
def test_formats_are_known_by_content(kind):
    data = encoded(Image.fromarray(RAMP).convert("RGB"), kind)
    assert decode(data).shape == (8, 8, 3)
    assert is_picture("a file", data[:64]) and not is_picture("a.jpg", b"<html><body>404</body></html>")


def test_formats_without_a_mark_are_known_by_name():
    data = encoded(Image.fromarray(RAMP), "TGA")
    assert is_picture("a.TGA", data[:64]) and not is_picture("a", data[:64]) and decode(data).shape == (8, 8, 3)


def test_a_small_file_cannot_ask_for_any_memory():
    bomb = encoded(Image.new("1", (12_000, 12_000)), "PNG")
    assert len(bomb) < 100_000
    with pytest.raises(UnreadableRecord, match="it has 12000 x 12000 pixels: expected 100,000,000 at most"):
        decode(bomb)


def test_nothing_is_run():
    """PostScript is a program."""
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.format == "EPS"
    with pytest.raises(UnreadableRecord, match="no picture of a known kind"):
        decode(data)
    assert "EPS" not in formats() and not {".eps", ".ps", ".mpg", ".txt", ".json"} & endings()
