"""Decodes picture files, told apart by their content, whatever their names end in."""

import functools
import io
import os
import struct
from typing import TYPE_CHECKING

import numpy as np

from unclip_jax.data.resampling import opencv
from unclip_jax.errors import UnreadableRecord

if TYPE_CHECKING:
    from PIL import Image

ORIENTATION = 0x0112  # EXIF's tag
PNG_HEADER = b"\x89PNG\r\n\x1a\n"
PNG_UNUSED = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # chunks that no pixel depends on
COMMON = ("JPEG", "PNG", "WEBP", "GIF")  # formats that are tried first
# Formats of Pillow that are left alone: PostScript is a program, which Ghostscript would run; the others hold no pixels
# that Pillow itself decodes.
NOT_PICTURES = {"EPS", "BUFR", "GRIB", "HDF5", "WMF", "MPEG", "IPTC"}
MOST_PIXELS = 100_000_000  # of a picture: a small file can claim any number, and take as much memory
SNIFFED_BYTES = 64  # of a file, by which its format is known
# Largest values of float and of 32-bit pixels: the first that no pixel of a picture exceeds is white.
FLOAT_WHITES, INTEGER_WHITES = (1.0, 255.0, 65535.0), (65535, 2**31 - 1)


def decode(data: bytes) -> np.ndarray:
    """Decodes a picture file to uint8 RGB (H, W, 3), turned upright, on white where it is transparent.

    Of several pictures in a file it takes the first. 16-bit values are scaled to 8 bits. So are floats, of which the
    least of FLOAT_WHITES that holds them all is white. Raises UnreadableRecord for a damaged file, and for a picture of
    more than MOST_PIXELS.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        try:
            return _to_rgb(Image.open(io.BytesIO(data), formats=formats()), data)
        except ValueError:
            # Pillow refuses PNG files for the size of the texts within, which are often a program's whole state.
            if (smaller := _without_texts(data)) is None:
                raise
            return _to_rgb(Image.open(io.BytesIO(smaller), formats=formats()), smaller)
    except UnreadableRecord:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableRecord("it is no picture of a known kind") from error
    except Exception as error:  # Pillow's decoders raise nearly anything for a damaged file
        raise UnreadableRecord(f"{type(error).__name__}: {error}") from error


@functools.cache
def formats() -> tuple[str, ...]:
    """Names the formats that are decoded, the commonest first."""
    from PIL import Image

    Image.init()
    return (*COMMON, *(name for name in Image.ID if name not in (*COMMON, *NOT_PICTURES)))


@functools.cache
def endings() -> frozenset[str]:
    """Lists the endings of the names of picture files, such as ".jpg"."""
    from PIL import Image

    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in formats())


def is_picture(name: str, first: bytes) -> bool:
    """Tells whether a file is a picture, by its first SNIFFED_BYTES, and by its name where its format has no mark."""
    from PIL import Image

    if not first:
        return False
    first = first.ljust(SNIFFED_BYTES, b"\0")  # Pillow takes it for granted that a file has some bytes
    accepts = [(known, Image.OPEN[known][1]) for known in formats()]
    if any(accept and accept(first) is True for _, accept in accepts):
        return True
    unmarked = {known for known, accept in accepts if not accept}
    return Image.registered_extensions().get(os.path.splitext(name)[1].lower()) in unmarked


def _to_rgb(picture: "Image.Image", data: bytes) -> np.ndarray:
    """Decodes a picture, opened from `data` but not read yet, of any mode, to uint8 RGB, upright."""
    from PIL import Image

    if picture.width * picture.height > MOST_PIXELS:
        raise UnreadableRecord(f"it has {picture.width} x {picture.height} pixels: expected {MOST_PIXELS:,} at most")
    if (pixels := _plain_jpeg(picture, data)) is not None:
        return pixels
    picture.load()  # before anything else, as a second reading of a damaged file would not fail
    picture = _upright(picture)
    if picture.mode.startswith("I") or picture.mode == "F":
        return np.stack([_to_8_bits(np.asarray(picture))] * 3, axis=-1)  # Pillow would clip these at 255
    if picture.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return np.asarray(picture.convert("RGB"))


def _upright(picture: "Image.Image") -> "Image.Image":
    """Turns a picture as its EXIF says, and not at all where that is damaged: its pixels may be sound."""
    from PIL import Image

    turns = Image.Transpose
    turn = {2: turns.FLIP_LEFT_RIGHT, 3: turns.ROTATE_180, 4: turns.FLIP_TOP_BOTTOM, 5: turns.TRANSPOSE,
            6: turns.ROTATE_270, 7: turns.TRANSVERSE, 8: turns.ROTATE_90}  # fmt: skip
    orientation = _orientation(picture)
    return picture.transpose(turn[orientation]) if orientation in turn else picture


def _orientation(picture: "Image.Image") -> int:
    """Returns the number by which EXIF says how a picture is to be turned; 1 for not at all."""
    try:
        orientation = picture.getexif().get(ORIENTATION)
    except Exception:  # Pillow reads EXIF as it finds it
        orientation = None
    return orientation if isinstance(orientation, int) else 1


def _plain_jpeg(picture: "Image.Image", data: bytes) -> np.ndarray | None:
    """Decodes a plain JPEG with OpenCV, in less time than Pillow, to the same pixels.

    Not at a reduced size, which JPEG allows: that saves an eighth of the time, as most of it goes into reading the
    file, and differs by up to 14 levels from the mean of the area. Returns None for all that takes Pillow: other
    formats and colours, pictures that are to be turned, damaged files, and where OpenCV is not installed.
    """
    cv2 = opencv()
    if not cv2 or picture.format != "JPEG" or picture.mode not in ("RGB", "L") or _orientation(picture) != 1:
        return None
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """Scales grey values of 16 bits or more, or floats, to uint8. Raises UnreadableRecord where that makes no sense."""
    if values.dtype.kind == "f":
        if not np.isfinite(values).all():
            raise UnreadableRecord("some of its pixels are not finite numbers")
        white = next((white for white in FLOAT_WHITES if values.max() <= white), None)
        if white is None:
            raise UnreadableRecord(f"its pixels are floats up to {values.max():.4g}: which of them is white?")
        return np.rint(values.clip(0, white) * (255 / white)).astype(np.uint8)
    white = next(white for white in INTEGER_WHITES if values.max() <= white)
    return (values.clip(0) // (white // 256 + 1)).astype(np.uint8)


def _without_texts(data: bytes) -> bytes | None:
    """Returns a PNG file without the chunks PNG_UNUSED; None where it is no PNG file or has none of them."""
    if not data.startswith(PNG_HEADER):
        return None
    kept, at = [PNG_HEADER], len(PNG_HEADER)
    while at + 8 <= len(data):
        end = at + 12 + struct.unpack(">I", data[at : at + 4])[0]
        if data[at + 4 : at + 8] not in PNG_UNUSED:
            kept.append(data[at:end])
        at = end
    return b"".join(kept) if sum(map(len, kept)) < len(data) else None
