"""Draws varied emoji scenes: one tinted drawing and a written word on a patterned background.

A scene has eight factors: object, tint, size, place, rotation, the background's colour and pattern, and word. Its
caption names the object and three or four of the other seven factors, and leaves the rest open. Scene and caption
depend on (split, index, seed) alone, and the picture on the scene alone, at any resolution. All factors can be read
back from a picture (`unclip_jax.evaluation.factors`).

The test split holds out combinations, never an object: each object has one tint, one place, one background colour and
one word that it never comes with in the train split. A test scene has exactly one of these four, and its caption names
it: it asks for something that was never seen, of which every part was.
"""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from unclip_jax.data.openmoji import colours, objects, rasterize, svg, with_article

COUNTS = {"train": 48_000, "test": 1_920}  # scenes: 1000 of each object, and 10 of each held-out combination

# Lengths are in units of 1/64 of the frame's side. All edges lie on whole units, so that a picture of 64 pixels is that
# of 256 averaged.
FRAME = 64
SIDES = {"small": 18, "medium": 24, "large": 32}  # side of the square that holds a drawing with its white rim
PLACES = {  # middle of that square: right, down
    "top left": (16, 16), "top": (32, 16), "top right": (48, 16),
    "left": (16, 32), "centre": (32, 32), "right": (48, 32),
    "bottom left": (16, 48), "bottom": (32, 48), "bottom right": (48, 48),
}  # fmt: skip
ROTATIONS = {"upright": 0, "counterclockwise": 1, "upside down": 2, "clockwise": 3}  # quarter turns counterclockwise
PATTERNS = ("plain", "striped", "dotted")
WORDS = ("ALSO", "EAT", "HELLO", "HOT", "LOST", "NEST", "NOTE", "ONE", "SALE", "SEA", "TEA", "TEN")

RIM = 1 / 16  # width of the white rim around a drawing, as a fraction of its square's side
_BRIGHTENING = 0.3  # exponent of luminance: all but black becomes bright enough to show a tint
_SMOOTH = 128  # side in pixels, about, at which small drawings are shaded before they are averaged
LABEL_WIDTH, LABEL_HEIGHT, LABEL_MARGIN = 44, 11, 1
_LETTER_WIDTH, _LETTER_HEIGHT, _LETTER_GAP, _STROKE = 5, 7, 2.6, 1.5
_LETTERS = {  # strokes, as SVG paths
    "A": "M0 7 L2.5 0 L5 7 M1 4.7 H4",
    "E": "M5 0 H0 V7 H5 M0 3.5 H4",
    "H": "M0 0 V7 M5 0 V7 M0 3.5 H5",
    "L": "M0 0 V7 H5",
    "N": "M0 7 V0 L5 7 V0",
    "O": "M2.5 0 C5.8 0 5.8 7 2.5 7 C-.8 7 -.8 0 2.5 0",
    "S": "M4.7 .9 C3.6 -.4 .3 -.4 .3 1.8 C.3 3.9 4.7 3 4.7 5.2 C4.7 7.4 1.2 7.4 0 6",
    "T": "M0 0 H5 M2.5 0 V7",
}

# Factors of which each object has one value in the test split only. The values take turns from object to object, by the
# given step from the given start, so that each is held out about equally often.
HELD_OUT = {"tint": (1, 0), "place": (2, 1), "colour": (3, 2), "word": (5, 3)}

_WHERE = {
    "top left": ("in the top left corner", "at the top left"),
    "top": ("in the middle at the top", "at the top centre"),
    "top right": ("in the top right corner", "at the top right"),
    "left": ("in the middle at the left", "at the centre left"),
    "centre": ("in the middle", "in the centre"),
    "right": ("in the middle at the right", "at the centre right"),
    "bottom left": ("in the bottom left corner", "at the bottom left"),
    "bottom": ("in the middle at the bottom", "at the bottom centre"),
    "bottom right": ("in the bottom right corner", "at the bottom right"),
}
_TURNED = {
    "upright": ("standing upright", "the right way up"),
    "counterclockwise": ("turned a quarter counterclockwise", "rotated 90 degrees counterclockwise"),
    "upside down": ("turned upside down", "rotated 180 degrees"),
    "clockwise": ("turned a quarter clockwise", "rotated 90 degrees clockwise"),
}
_FORMS = 4  # orders of words in a caption


@dataclasses.dataclass(frozen=True)
class Scene:
    """One value of each factor. colour: that of the background."""

    object: str
    tint: str
    size: str
    place: str
    rotation: str
    colour: str
    pattern: str
    word: str


def factors() -> dict[str, tuple[str, ...]]:
    """Lists the values of each factor, object first. The data draw all values alike, except those held out."""
    values = {"object": objects(), "tint": tuple(colours()), "size": tuple(SIDES), "place": tuple(PLACES)}
    values |= {"rotation": tuple(ROTATIONS), "colour": tuple(colours()), "pattern": PATTERNS, "word": WORDS}
    return values


def noun(name: str) -> str:
    """Returns the name of an object in captions, where a tint may precede it: "red apple" is "apple"."""
    return name.removeprefix("red ")


def held_out(name: str, factor: str) -> str:
    """Returns the value of a factor, a key of `HELD_OUT`, that an object has in the test split only."""
    step, start = HELD_OUT[factor]
    values = factors()[factor]
    return values[(objects().index(name) * step + start) % len(values)]


def scenes(split: str, seed: int = 0) -> Iterator[tuple[Scene, tuple[str, ...], str]]:
    """Yields all (scene, named factors besides the object, caption) of a split, "train" or "test", by index."""
    for index in range(COUNTS[split]):
        yield scene_at(split, index, seed)


def scene_at(split: str, index: int, seed: int = 0) -> tuple[Scene, tuple[str, ...], str]:
    """Returns one (scene, named factors besides the object, caption). index: any from 0 on, also beyond `COUNTS`."""
    pick = _picks(f"{split} {index} {seed}")
    values = factors()
    name = values.pop("object")[index % len(objects())]
    new = list(HELD_OUT)[index // len(objects()) % len(HELD_OUT)] if split == "test" else ""
    chosen = {}
    for factor, options in values.items():
        kept = held_out(name, factor) if factor in HELD_OUT else ""
        seen = [value for value in options if value != kept]
        chosen[factor] = kept if factor == new else seen[pick(len(seen))]
    scene = Scene(object=name, **chosen)

    others = [factor for factor in values if factor != new]
    named = {new} - {""}
    for _ in range(3 + pick(2) - len(named)):
        named.add(others.pop(pick(len(others))))
    ordered = tuple(factor for factor in values if factor in named)
    return scene, ordered, caption(scene, ordered, pick(8 * _FORMS))


def _picks(text: str) -> Callable[[int], int]:
    """Makes a function that draws from range(n) by a hash of the text, which is equal on all machines."""
    rest = int.from_bytes(hashlib.sha256(text.encode()).digest())

    def pick(n: int) -> int:
        nonlocal rest
        rest, drawn = divmod(rest, n)
        return drawn

    return pick


def caption(scene: Scene, named: tuple[str, ...], wording: int = 0) -> str:
    """Describes the object and the named factors in words. wording: its number, 0 or higher; 0 is the plainest."""
    turn, form = divmod(wording, _FORMS)
    shown = {factor: getattr(scene, factor) for factor in named}

    adjectives = [shown[factor] for factor in ("size", "tint") if factor in shown]
    subject = [with_article(" ".join([*adjectives, noun(scene.object)]))]
    subject += [_TURNED[shown["rotation"]][turn % 2]] if "rotation" in shown else []
    subject += [_WHERE[shown["place"]][turn // 2 % 2]] if "place" in shown else []
    text = " ".join(subject)

    looks = [shown[factor] for factor in ("pattern", "colour") if factor in shown]
    ground = with_article(" ".join([*looks, "background"])) if looks else ""
    on_ground = f" {('on', 'against')[turn // 4 % 2]} {ground}" if ground else ""
    word = f'the word "{scene.word}"' if "word" in shown else ""

    # A form that would begin with something that is not named falls back to the plainest.
    if form == 2 and ground:
        return f"{ground} with {text}" + (f", and {word}" if word else "")
    if form == 3 and word:
        return f"{word}, and {text}{on_ground}"
    return ("a picture of " if form == 1 else "") + text + on_ground + (f", with {word}" if word else "")


def read_caption(text: str) -> tuple[Scene, tuple[str, ...]] | None:
    """Finds a scene that a caption describes, and the factors that it names besides the object; None for another text.

    A factor that is not named has its first value in the scene.
    """
    rest, found = text, {}
    for phrases in _phrases():
        match = re.search(phrases, rest)
        if match:
            found |= {name: value for name, value in match.groupdict().items() if value}
            rest = rest[: match.start()] + rest[match.end() :]
    for factor, words in (("rotation", _TURNED), ("place", _WHERE)):
        if factor in found:
            found[factor] = next(value for value, forms in words.items() if found[factor] in forms)
    names = {noun(name): name for name in objects()}
    if found.get("object") not in names:
        return None
    found["object"] = names[found["object"]]
    named = tuple(factor for factor in factors() if factor in found and factor != "object")
    scene = Scene(**({factor: values[0] for factor, values in factors().items()} | found))
    return (scene, named) if text in {caption(scene, named, wording) for wording in range(8 * _FORMS)} else None


@functools.cache
def _phrases() -> list[str]:
    """Regular expressions of the parts of a caption, in the order in which they are taken out of it."""

    def any_of(values: Iterable[str]) -> str:
        return "|".join(sorted(map(re.escape, values), key=len, reverse=True))

    values = factors()
    nouns = map(noun, values["object"])
    colour = any_of(values["colour"])
    return [
        f'the word "(?P<word>{any_of(WORDS)})"',
        f"an? (?:(?P<pattern>{any_of(PATTERNS)}) )?(?:(?P<colour>{colour}) )?background",
        f"(?P<rotation>{any_of(form for forms in _TURNED.values() for form in forms)})",
        f"(?P<place>{any_of(form for forms in _WHERE.values() for form in forms)})",
        f"an? (?:(?P<size>{any_of(SIDES)}) )?(?:(?P<tint>{colour}) )?(?P<object>{any_of(nouns)})",
    ]


def box(size: str, place: str) -> tuple[int, int, int, int]:
    """Returns left, top, right and bottom of the square that holds the drawing with its rim, in units."""
    (right, down), half = PLACES[place], SIDES[size] // 2
    return right - half, down - half, right + half, down + half


def label_box(place: str) -> tuple[int, int, int, int]:
    """Returns left, top, right and bottom of the label, in units. It is at the bottom unless the drawing is."""
    left = (FRAME - LABEL_WIDTH) // 2
    top = LABEL_MARGIN if place.startswith("bottom") else FRAME - LABEL_MARGIN - LABEL_HEIGHT
    return left, top, left + LABEL_WIDTH, top + LABEL_HEIGHT


def render(scene: Scene, size: int) -> np.ndarray:
    """Renders a scene as uint8 RGB (size, size, 3)."""
    picture = background(scene.colour, scene.pattern, size).astype(np.float32)

    left, top, right, bottom = (round(edge * size / FRAME) for edge in box(scene.size, scene.place))
    layers = np.rot90(sticker(scene.object, right - left), ROTATIONS[scene.rotation])
    ink, paper, opaque = np.split(layers, 3, axis=-1)
    patch = picture[top:bottom, left:right]
    patch[:] = patch * (1 - opaque) + ink * np.array(colours()[scene.tint], np.float32) + paper * 255

    left, top, right, bottom = (round(edge * size / FRAME) for edge in label_box(scene.place))
    written = label(scene.word, right - left, bottom - top).astype(np.float32)
    alpha = written[..., 3:] / 255
    patch = picture[top:bottom, left:right]
    patch[:] = patch * (1 - alpha) + written[..., :3] * alpha
    return np.rint(picture).astype(np.uint8)


@functools.lru_cache(maxsize=24)
def background(colour: str, pattern: str, size: int) -> np.ndarray:
    """Renders a background alone as uint8 RGB (size, size, 3). Its marks are lighter, or on a light colour darker."""
    base = np.array(colours()[colour])
    mark = base * 0.8 if base @ (0.3, 0.59, 0.11) > 170 else base + (255 - base) * 0.35
    plain, marked = (f"rgb({','.join(str(round(value)) for value in values)})" for values in (base, mark))
    drawn = ""
    if pattern == "striped":
        lines = "".join(f"M{x} -1 L{x - FRAME - 2} {FRAME + 1}" for x in range(0, 2 * FRAME + 16, 16))
        drawn = f'<path d="{lines}" stroke="{marked}" stroke-width="{8 / 2**0.5}"/>'
    elif pattern == "dotted":
        at = [(x + shift, y + shift) for x in range(4, FRAME, 16) for y in range(4, FRAME, 16) for shift in (0, 8)]
        drawn = "".join(f'<circle cx="{x}" cy="{y}" r="3" fill="{marked}"/>' for x, y in at)
    whole = f'<rect width="{FRAME}" height="{FRAME}" fill="{plain}"/>{drawn}'
    return _frozen(rasterize(_document(0, 0, FRAME, FRAME, whole), size)[..., :3])


@functools.lru_cache(maxsize=160)
def sticker(name: str, side: int) -> np.ndarray:
    """Renders an upright drawing with its rim in a square, without a tint: float32 (side, side, 3), 0 to 1.

    The last axis is, for each pixel, the weight of the tint (less where the drawing is dark), the weight of white (the
    rim's), and the fraction of the background that they cover.
    """
    x, y, units, _, body = re.fullmatch(
        r'.*?<svg[^>]*?viewBox="(\S+) (\S+) (\S+) (\S+)"[^>]*>(.*)</svg>\s*', svg(name), re.DOTALL
    ).groups()
    rim = float(units) * RIM / (1 - 2 * RIM)
    square = float(x) - rim, float(y) - rim, float(units) + 2 * rim, float(units) + 2 * rim

    # The drawing's silhouette is blurred, and the rim covers all that its blur reaches.
    place = '<filter id="rim" filterUnits="userSpaceOnUse" x="{}" y="{}" width="{}" height="{}">'.format(*square)
    blur = f'<feGaussianBlur in="SourceAlpha" stdDeviation="{0.6 * rim}"/>'
    spread = '<feComponentTransfer><feFuncA type="linear" slope="12" intercept="-0.6"/></feComponentTransfer>'
    blurred = f'{place}{blur}{spread}</filter><g filter="url(#rim)">{body}</g>'

    # A small drawing is shaded at a larger size and then averaged, or its outlines would fade. Sums of whole numbers
    # are equal on all machines.
    times = max(1, round(_SMOOTH / side))
    paper = rasterize(_document(*square, blurred), side * times)[..., 3].astype(np.int64)
    drawn = rasterize(_document(*square, body), side * times).astype(np.int64)
    shades = np.array([round(255 * (level / 255) ** _BRIGHTENING) for level in range(256)])
    luminance, opaque = drawn[..., :3] @ (77, 150, 29) // 256, drawn[..., 3]
    layers = [opaque * shades[luminance], paper * (255 - opaque), 255**2 - (255 - paper) * (255 - opaque)]
    sums = np.stack(layers, axis=-1).reshape(side, times, side, times, 3).sum(axis=(1, 3))
    return _frozen((sums / (255 * times) ** 2).astype(np.float32))


@functools.lru_cache(maxsize=24)
def label(word: str, width: int, height: int) -> np.ndarray:
    """Renders a word on a white label as uint8 RGBA (height, width, 4). Colours are not multiplied by alpha."""
    left = (LABEL_WIDTH - len(word) * (_LETTER_WIDTH + _LETTER_GAP) + _LETTER_GAP) / 2
    top = (LABEL_HEIGHT - _LETTER_HEIGHT) / 2
    strokes = ""
    for k, letter in enumerate(word):
        at = f"translate({left + k * (_LETTER_WIDTH + _LETTER_GAP)} {top})"
        strokes += f'<path transform="{at}" d="{_LETTERS[letter]}"/>'
    paper = f'<rect width="{LABEL_WIDTH}" height="{LABEL_HEIGHT}" rx="2" fill="white"/>'
    style = f'fill="none" stroke="black" stroke-width="{_STROKE}" stroke-linecap="round" stroke-linejoin="round"'
    ink = f"<g {style}>{strokes}</g>"
    whole = f'<g transform="scale({width / LABEL_WIDTH} {height / LABEL_HEIGHT})">{paper}{ink}</g>'
    return _frozen(rasterize(_document(0, 0, width, height, whole), width, height))


def _document(x: float, y: float, width: float, height: float, body: str) -> str:
    """Wraps the elements of a drawing in an SVG document that shows a part of the plane."""
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{x} {y} {width} {height}">{body}</svg>'


def _frozen(values: np.ndarray) -> np.ndarray:
    """Makes an array that is kept for later calls read-only."""
    values.setflags(write=False)
    return values
