"""Makes files that people look at: PNG with the prompt inside, grids of pictures with captions, and animations."""

import io
import json
import re
import sys
import unicodedata
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from unclip_jax.errors import UserError, one_line
from unclip_jax.paths import to_path, write_bytes

NAME_BYTES = 120  # of a file's name, which may have 255 in all
# Fonts with more letters than Pillow's own, where one is installed.
WIDE_FONTS = ("NotoSansCJK-Regular.ttc", "DroidSansFallbackFull.ttf", "wqy-microhei.ttc", "PingFang.ttc", "msyh.ttc",
              "DejaVuSans.ttf")  # fmt: skip
UNSEEN = ("Cc", "Cf", "Mn", "Zl", "Zp", "Zs")  # categories of Unicode that are not drawn, or upon letters
CAPTIONED = 96  # pixels of width that a word of a caption needs
GAP = 4  # pixels between pictures of a grid
INK, PAPER = (40, 40, 40), (255, 255, 255)  # colours of a grid, red, green, blue


def png(image: np.ndarray, metadata: dict[str, object] | None = None) -> bytes:
    """Encodes a picture, uint8 (H, W, 3), as a PNG file. metadata: name → text, or a value to store as JSON."""
    info = PngImagePlugin.PngInfo()
    for name, value in (metadata or {}).items():
        info.add_itxt(name, value if isinstance(value, str) else json.dumps(value))
    encoded = io.BytesIO()
    Image.fromarray(np.asarray(image)).save(encoded, "PNG", pnginfo=info)
    return encoded.getvalue()


def save_png(path: str | Path, image: np.ndarray, metadata: dict[str, object] | None = None) -> None:
    """Writes a picture as `png` encodes it; the file appears as a whole or not at all."""
    write_bytes(to_path(path), png(image, metadata))


def add_file(path: Path, content: bytes) -> Path:
    """Writes a file and returns its path: `path`, or NAME-2, NAME-3, … where another file is there already."""
    place, number = path, 1
    while place.exists() and place.read_bytes() != content:
        number += 1
        place = path.with_name(f"{path.stem}-{number}{path.suffix}")
    write_bytes(place, content)
    return place


def file_name(text: str) -> str:
    """Makes of a text a part of a file's name: letters, digits and "_", at most NAME_BYTES bytes."""
    words = re.sub(r"\W+", "_", text).strip("_")
    return words.encode(errors="ignore")[:NAME_BYTES].decode(errors="ignore")


def gif(frames: np.ndarray, seconds: float = 2.0) -> bytes:
    """Encodes pictures, uint8 (N, H, W, 3), as a GIF that runs through them forwards and backwards for ever.

    seconds: for all pictures, one way.
    """
    forwards = [Image.fromarray(frame) for frame in np.asarray(frames)]
    loop = forwards + forwards[-2:0:-1]
    duration = max(20, int(1000 * seconds / len(forwards)))  # milliseconds of a picture
    encoded = io.BytesIO()
    loop[0].save(encoded, "GIF", save_all=True, append_images=loop[1:], duration=duration, loop=0)
    return encoded.getvalue()


def grid(images: np.ndarray, columns: int | None = None, captions: list[str] | None = None) -> np.ndarray:
    """Arranges pictures, uint8 (N, H, W, 3), in one picture, uint8 (height, width, 3), each above its caption.

    columns: pictures in a row; by default about as many as there are rows. With captions, pictures that have no room
    for a word below them are enlarged without smoothing.
    """
    images = np.asarray(images)
    if captions:
        times = -(-CAPTIONED // images.shape[2])
        images = images.repeat(times, axis=1).repeat(times, axis=2)
    count, height, width, _ = images.shape
    columns = columns or int(np.ceil(count**0.5))
    rows = -(-count // columns)
    text_height = 0
    if captions:
        font = _font(max(9, width // 16), "".join(captions))
        wrapped = [_wrapped(caption, font, width) for caption in captions]
        line = sum(font.getmetrics())
        text_height = line * max(len(lines) for lines in wrapped) + GAP
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + text_height + GAP) + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x, y = GAP + i % columns * (width + GAP), GAP + i // columns * (height + text_height + GAP)
        sheet.paste(Image.fromarray(image), (x, y))
        for k, words in enumerate(wrapped[i] if captions else []):
            draw.text((x + (width - font.getlength(words)) / 2, y + height + 1 + k * line), words, INK, font)
    return np.asarray(sheet)


def shown(
    images: np.ndarray, captions: list[str] | None = None, columns: int | None = None, side: int = 128
) -> Image.Image:
    """Arranges pictures as `grid` does, for a notebook: enlarged without smoothing to at least `side` pixels."""
    times = -(-side // images.shape[1])
    return Image.fromarray(grid(images.repeat(times, axis=1).repeat(times, axis=2), columns, captions))


def _font(size: int, text: str) -> ImageFont.FreeTypeFont:
    """Returns the first font that has all letters of a text, or the one that lacks fewest; says which it lacks."""
    best, lacking = ImageFont.load_default(size), text
    for name in ("", *WIDE_FONTS):
        try:
            font = ImageFont.truetype(name, size) if name else best
        except OSError:
            continue
        found = _lacking(font, text)
        if len(found) < len(lacking):
            best, lacking = font, found
        if not lacking:
            break
    if lacking:
        few = one_line(lacking[:20])
        print(f"no font here has {few}: captions show boxes for them; texts in files are whole", file=sys.stderr)
    return best


def _lacking(font: ImageFont.FreeTypeFont, text: str) -> str:
    """Lists the letters of a text for which a font draws what it draws for a character that there is not."""
    nothing = bytes(font.getmask("\U0010fffe"))
    seen = (c for c in set(text) if unicodedata.category(c) not in UNSEEN)
    return "".join(sorted(c for c in seen if bytes(font.getmask(c)) == nothing))


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Breaks a text into lines of at most `width` pixels, but never within a word."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def to_float(images: np.ndarray) -> np.ndarray:
    """Maps uint8 pictures to float32 in [-1, 1]."""
    return images.astype(np.float32) / 127.5 - 1


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Rounds pictures in [-1, 1] to uint8; clips what is outside. Raises UserError for numbers that are not finite."""
    if not np.isfinite(images).all():
        raise UserError("a picture holds numbers that are not finite: the model that drew it is damaged or diverged")
    return np.clip(np.rint((images + 1) * 127.5), 0, 255).astype(np.uint8)
