"""Reads the eight factors of varied emoji scenes from pictures, without a network.

The scene that explains a picture best, in the least-squares sense, is searched for: first among all backgrounds, then
among all labels, and then, on the background that was found, among all drawings in all rotations, sizes, places and
tints, first coarsely and then finely for the best of these. What the scene that was found leaves unexplained tells
whether the picture shows a scene at all.

A pixel with a drawing on a background b is ink · tint + 255 · paper + (1 - opaque) · b, by the three layers of
`varied_scenes.sticker`. The drawing so changes the background by q = ink · tint + 255 · paper - opaque · b. With
d = picture - b, the squared error is |d - q|² = |d|² + |q|² - 2 d · q. Here |q|² does not depend on the picture, and
d · q consists of inner products of d and d · b with the layers. A few matrix products therefore compare a picture with
48 objects × 4 rotations × 3 sizes × 9 places × 8 tints.
"""

import dataclasses
import functools
import itertools
from typing import NamedTuple

import numpy as np

from unclip_jax.data import varied_scenes
from unclip_jax.data.openmoji import colours, objects
from unclip_jax.data.varied_scenes import FRAME, PATTERNS, PLACES, ROTATIONS, SIDES, WORDS, Scene

# The most that may stay unexplained of each part of a readable picture, in root mean square at 32 pixels a side: of the
# worst square of background and the worst letter as a fraction of the range of brightness, of the object as a fraction
# of the change that the drawing makes to the background.
UNEXPLAINED = {"background": 0.12, "word": 0.12, "object": 0.35}
SHOWN_BY = {"colour": "background", "pattern": "background", "word": "word"}  # factor → part; others: the object

_CHUNK = 16  # pictures compared at once
_NEAR = tuple(itertools.product((-1, 0, 1), repeat=2))  # shifts (down, right) of a drawing
_LABEL_SHIFTS = tuple(itertools.product((-2, -1, 0, 1, 2), repeat=2))
_KEPT = 3  # drawings of each size that are compared finely
_MARGIN = 4  # pixels added on each side of the frame, more than any shift
_WIDE = FRAME + 2 * _MARGIN
_CAP = 100.0  # largest distance of a pixel from a background's colour that counts, because drawings cover some pixels
_BLOCK = 4  # pixels, of 32, a side of a square of background, and about the width of a letter
_ALIKE = 0.1  # rotations of a small drawing that differ by less, in root mean square, are one


@dataclasses.dataclass(frozen=True)
class Reading:
    """Scenes that explain N pictures best.

    unexplained: "background", "word" and "object" → float32 (N,), in the units of `UNEXPLAINED`.
    readable: bool (N,), True where all three are small enough and the label is on the side that goes with the place.
    """

    scenes: list[Scene]
    unexplained: dict[str, np.ndarray]
    readable: np.ndarray

    def shows(self, factor: str) -> np.ndarray:
        """Tells which pictures show a factor readably: bool (N,), True where the part that shows it is explained."""
        part = SHOWN_BY.get(factor, "object")
        return self.unexplained[part] < UNEXPLAINED[part]


class _Drawings(NamedTuple):
    """Indices of drawings: arrays of one shape, and of shifts from the place in pixels."""

    size: np.ndarray
    place: np.ndarray
    template: np.ndarray  # object and rotation
    tint: np.ndarray
    down: np.ndarray
    right: np.ndarray


def read(images: np.ndarray) -> Reading:
    """Reads uint8 RGB (N, S, S, 3) with N > 0. True pictures are read without error if S is a multiple of 64."""
    chunks = [_read(to_frame(images[start : start + _CHUNK])) for start in range(0, len(images), _CHUNK)]
    scenes, unexplained, fits = (list(itertools.chain(*parts)) for parts in zip(*chunks, strict=True))
    unexplained = np.array(unexplained, np.float32)
    readable = np.array(fits) & (unexplained < list(UNEXPLAINED.values())).all(axis=1)
    return Reading(scenes, dict(zip(UNEXPLAINED, unexplained.T, strict=True)), readable)


def to_frame(images: np.ndarray) -> np.ndarray:
    """Resizes square pictures to 64 pixels a side by averaging areas: float32 (N, 64, 64, 3)."""
    size = images.shape[1]
    edges, pixels = np.arange(FRAME + 1) * size / FRAME, np.arange(size)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    weights = (np.clip(overlap, 0, None) * FRAME / size).astype(np.float32)
    rows = weights @ images.reshape(len(images), size, -1).astype(np.float32)
    return weights @ rows.reshape(len(images), FRAME, size, 3)


@functools.cache
def rotation_as_read(name: str, rotation: str) -> str:
    """Returns the first rotation of an object that looks like the given one: of a lemon, upside down is upright."""
    small = varied_scenes.sticker(name, min(SIDES.values()))
    given = np.rot90(small, ROTATIONS[rotation])
    differences = [np.sqrt(np.square(np.rot90(small, turns) - given).mean()) for turns in ROTATIONS.values()]
    return next(other for other, difference in zip(ROTATIONS, differences, strict=True) if difference < _ALIKE)


def as_read(scene: Scene) -> Scene:
    """Replaces a scene's rotation by `rotation_as_read`, so that scenes that look alike are equal."""
    return dataclasses.replace(scene, rotation=rotation_as_read(scene.object, scene.rotation))


def _read(pictures: np.ndarray) -> tuple[list[Scene], list[tuple[float, float, float]], list[bool]]:
    """Reads float32 (N, 64, 64, 3): scenes, what they leave unexplained, and whether label and place go together."""
    ground, plain = _nearest_background(pictures)
    word, side, corner = _nearest_label(pictures)

    # The label is no part of the change that a drawing has to explain.
    labelled, change = _wide(plain, "edge"), _wide(pictures - plain)
    for n, (row, column) in enumerate(corner):
        area = np.s_[n, row : row + varied_scenes.LABEL_HEIGHT, column : column + varied_scenes.LABEL_WIDTH]
        written = _labels()[word[n]]
        labelled[area] += written[..., 3:] / 255 * (written[..., :3] - labelled[area])
        change[area] = 0
    drawn = _nearest_drawing(change, _wide(plain, "edge"), ground)

    scenes, unexplained, fits = [], [], []
    for n, picture in enumerate(pictures):
        size, place, template, tint, down, right = (int(index[n]) for index in drawn)
        (name, turns), (colour, pattern) = divmod(template, len(ROTATIONS)), divmod(int(ground[n]), len(PATTERNS))
        indices = (name, tint, size, place, turns, colour, pattern, word[n])
        values = varied_scenes.factors().values()
        scene = Scene(*(options[index] for options, index in zip(values, indices, strict=True)))
        scenes.append(as_read(scene))
        unexplained.append(_unexplained(picture, labelled[n], corner[n], scene, (down, right)))
        fits.append(varied_scenes.label_box(scene.place) == varied_scenes.label_box(side[n]))
    return scenes, unexplained, fits


def _unexplained(
    picture: np.ndarray, labelled: np.ndarray, corner: tuple[int, int], scene: Scene, shift: tuple[int, int]
) -> tuple[float, float, float]:
    """Measures what a scene leaves unexplained of background, word and object.

    labelled: its background with the label, float32 (72, 72, 3). corner: the label's top and left there. shift: of the
    drawing from its place, down and right.
    """
    left, top, right, bottom = varied_scenes.box(scene.size, scene.place)
    down, along = (step + _MARGIN for step in shift)
    area = np.s_[top + down : bottom + down, left + along : right + along]
    whole = labelled.copy()
    layers = np.rot90(varied_scenes.sticker(scene.object, right - left), ROTATIONS[scene.rotation])
    ink, paper, opaque = np.split(layers, 3, axis=-1)
    whole[area] += ink * np.array(colours()[scene.tint], np.float32) + 255 * paper - opaque * whole[area]

    inner = np.s_[_MARGIN:-_MARGIN, _MARGIN:-_MARGIN]
    error = np.square(_halved(picture - whole[inner])).sum(axis=-1)
    change = np.square(_halved((whole - labelled)[inner])).sum()
    part = np.zeros((3, _WIDE, _WIDE, 1))  # background, label, drawing
    part[2][area] = 1
    row, column = corner
    part[1, row : row + varied_scenes.LABEL_HEIGHT, column : column + varied_scenes.LABEL_WIDTH] = 1
    part = _halved(part[:, *inner])[..., 0] > 0
    part[0] = ~(part[1] | part[2])

    # Squares that are mostly background, and strips of the label as wide as a letter.
    squares = np.stack([error * part[0], part[0]]).reshape(2, FRAME // 2 // _BLOCK, _BLOCK, -1, _BLOCK).sum(axis=(2, 4))
    background = (squares[0] / np.maximum(squares[1], _BLOCK**2 / 2)).max()
    columns = np.stack([error * part[1], part[1]]).sum(axis=1)[:, part[1].any(axis=0)]
    strips = np.lib.stride_tricks.sliding_window_view(columns, _BLOCK, axis=1).sum(axis=-1)
    word = (strips[0] / strips[1]).max()
    scale = 3 * 255**2
    return (background / scale) ** 0.5, (word / scale) ** 0.5, ((error * part[2]).sum() / change) ** 0.5


def _nearest_background(pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the nearest backgrounds' indices (N,) and the backgrounds themselves, float32 (N, 64, 64, 3)."""
    coarse = _halved(pictures)
    errors = [np.square(coarse - ground).sum(axis=-1) for ground in _halved(_backgrounds())]
    which = np.array([np.minimum(error, _CAP**2).sum(axis=(1, 2)) for error in errors]).argmin(axis=0)
    return which, _backgrounds()[which]


def _nearest_label(pictures: np.ndarray) -> tuple[np.ndarray, list[str], list[tuple[int, int]]]:
    """Returns indices of words (N,), for each label a place that goes with it, and its top and left when widened."""
    solid = (_labels()[0, ..., 3] == 255).ravel()
    known = _labels()[..., :3].mean(axis=-1).reshape(len(WORDS), -1)[:, solid]
    gray = np.pad(pictures.mean(axis=-1), [(0, 0), (_MARGIN,) * 2, (_MARGIN,) * 2], mode="edge")
    errors, where = [], []
    for place in ("centre", "bottom"):
        left, top, right, bottom = (edge + _MARGIN for edge in varied_scenes.label_box(place))
        for down, along in _LABEL_SHIFTS:
            seen = gray[:, top + down : bottom + down, left + along : right + along].reshape(len(gray), -1)[:, solid]
            errors.append(np.square(seen).sum(axis=1)[:, None] - 2 * seen @ known.T + np.square(known).sum(axis=1))
            where.append((place, (top + down, left + along)))
    best, word = np.divmod(np.stack(errors, axis=1).reshape(len(gray), -1).argmin(axis=1), len(WORDS))
    return word, [where[k][0] for k in best], [where[k][1] for k in best]


def _nearest_drawing(change: np.ndarray, plain: np.ndarray, ground: np.ndarray) -> _Drawings:
    """Finds the drawing that explains each change of its background best.

    change, plain: float32 (N, 72, 72, 3), the change and the background. ground: the background's index, (N,).
    """
    sums, products = change.sum(axis=-1, keepdims=True), (change * plain).sum(axis=-1, keepdims=True)
    found = [_coarse_search(k, change, sums, products, ground) for k in range(len(SIDES))]
    found = _Drawings(*(np.concatenate(parts, axis=1) for parts in zip(*found, strict=True)))

    # At half the resolution too, but from every pixel on, because fine detail is the first thing that a blur takes.
    stickers = _centred_stickers()[found.size, found.template]
    side = stickers.shape[2]
    shown = stickers[..., :1] * _tints()[found.tint][:, :, None, None] + 255 * stickers[..., 1:2]
    middles = np.array(list(PLACES.values()))[found.place] - side // 2 + _MARGIN
    rows = (middles[..., 1] + found.down)[..., None, None] + np.arange(side)[:, None]
    columns = (middles[..., 0] + found.right)[..., None, None] + np.arange(side)
    each = np.arange(len(change))
    errors = []
    for down, right in _NEAR:
        area = each[:, None, None, None], rows + down, columns + right
        made, seen = _halved(shown - stickers[..., 2:] * plain[area]), _halved(change[area])
        errors.append((made * (made - 2 * seen)).sum(axis=(2, 3, 4)))
    best, near = np.divmod(np.stack(errors, axis=-1).reshape(len(change), -1).argmin(axis=1), len(_NEAR))
    down, right = np.array(_NEAR)[near].T
    found = _Drawings(*(values[each, best] for values in found))
    return found._replace(down=found.down + down, right=found.right + right)


def _coarse_search(
    size: int, change: np.ndarray, sums: np.ndarray, products: np.ndarray, ground: np.ndarray
) -> _Drawings:
    """Finds the `_KEPT` drawings of one size that explain each change best, each with its best tint and shift: (N, 3).

    sums, products: over the channels, of the change and of the change times the background: (N, 72, 72, 1).
    """
    ink, paper, opaque = _flat_stickers(size)
    windows = _windows(change, size)
    each_ink = (windows.reshape(3, -1, windows.shape[-1]) @ ink.T).reshape(3, -1)
    cost = (_tints() @ each_ink).reshape(-1, *windows.shape[1:4], len(ink))  # (tints, N, places, shifts, templates)
    cost += 255 * _windows(sums, size)[0] @ paper.T - _windows(products, size)[0] @ opaque.T
    cost *= -2
    cost += _energies(size)[:, ground]

    least = cost.min(axis=0).min(axis=2).reshape(len(ground), -1)
    place, template = np.divmod(np.argpartition(least, _KEPT, axis=1)[:, :_KEPT], len(ink))
    kept = cost[:, np.arange(len(ground))[:, None], place, :, template]  # (N, kept, tints, shifts)
    tint, near = np.divmod(kept.reshape(*place.shape, -1).argmin(axis=-1), len(_NEAR))
    down, right = 2 * np.array(_NEAR)[near].transpose(2, 0, 1)
    return _Drawings(np.full_like(place, size), place, template, tint, down, right)


def _windows(values: np.ndarray, size: int) -> np.ndarray:
    """Cuts the squares that drawings of one size may fill from (N, 72, 72, C), at half the resolution.

    Returns float32 (C, N, places, shifts by two pixels, pixels).
    """
    side = list(SIDES.values())[size] // 2
    odd = side % 2  # makes the squares begin on a pixel of half the resolution
    halved = _halved(values[:, odd : _WIDE - odd, odd : _WIDE - odd]).transpose(3, 0, 1, 2)
    out = np.empty((*halved.shape[:2], len(PLACES), len(_NEAR), side**2), np.float32)
    for k, (right, down) in enumerate(PLACES.values()):
        top, left = ((middle - side + _MARGIN - odd) // 2 for middle in (down, right))
        for m, (a, b) in enumerate(_NEAR):
            window = halved[:, :, top + a : top + a + side, left + b : left + b + side]
            out[:, :, k, m] = window.reshape(*halved.shape[:2], -1)
    return out


@functools.cache
def _energies(size: int) -> np.ndarray:
    """Computes |q|² of all drawings on all backgrounds: float32 (tints, backgrounds, 1, shifts, templates).

    The 1 stands for all places, because patterns repeat from place to place.
    """
    ink, paper, opaque = _flat_stickers(size)
    tints = _tints()
    plain = _windows(_wide(_backgrounds(), "edge"), size)[:, :, :1]
    alone = np.square(tints).sum(axis=1)[:, None] * np.square(ink).sum(axis=1)
    alone += 2 * 255 * tints.sum(axis=1)[:, None] * (ink * paper).sum(axis=1)
    alone += 3 * 255**2 * np.square(paper).sum(axis=1)
    crossed = np.tensordot(tints, plain @ (ink * opaque).T, (1, 0))
    hidden = np.square(plain).sum(axis=0) @ np.square(opaque).T - 2 * 255 * plain.sum(axis=0) @ (paper * opaque).T
    return alone[:, None, None, None] - 2 * crossed + hidden


@functools.cache
def _stickers(size: int) -> np.ndarray:
    """Renders all objects in all rotations: float32 (192, side, side, 3), the layers of `varied_scenes.sticker`."""
    side = list(SIDES.values())[size]
    upright = np.stack([varied_scenes.sticker(name, side) for name in objects()])
    turned = np.stack([np.rot90(upright, turns, axes=(1, 2)) for turns in ROTATIONS.values()], axis=1)
    return turned.reshape(-1, side, side, 3)


@functools.cache
def _flat_stickers(size: int) -> np.ndarray:
    """Returns the layers of `_stickers` at half the resolution: float32 (3, 192, pixels)."""
    halved = _halved(_stickers(size))
    return np.ascontiguousarray(halved.reshape(len(halved), -1, 3).transpose(2, 0, 1))


@functools.cache
def _centred_stickers() -> np.ndarray:
    """Puts stickers of all sizes in the middle of the largest's square: float32 (sizes, 192, side, side, 3)."""
    margins = [(max(SIDES.values()) - side) // 2 for side in SIDES.values()]
    return np.stack([np.pad(_stickers(k), [(0, 0), (m, m), (m, m), (0, 0)]) for k, m in enumerate(margins)])


@functools.cache
def _backgrounds() -> np.ndarray:
    """Renders all colours in all patterns: float32 (24, 64, 64, 3)."""
    each = itertools.product(colours(), PATTERNS)
    return np.stack([varied_scenes.background(*look, FRAME) for look in each]).astype(np.float32)


@functools.cache
def _labels() -> np.ndarray:
    """Renders all words: float32 (words, height, width, 4), 0 to 255."""
    size = varied_scenes.LABEL_WIDTH, varied_scenes.LABEL_HEIGHT
    return np.stack([varied_scenes.label(word, *size) for word in WORDS]).astype(np.float32)


def _tints() -> np.ndarray:
    return np.array(list(colours().values()), np.float32)


def _halved(values: np.ndarray) -> np.ndarray:
    """Averages squares of 2 × 2 pixels: (…, H, W, C) → (…, H / 2, W / 2, C)."""
    rows = values[..., ::2, :, :] + values[..., 1::2, :, :]
    return (rows[..., ::2, :] + rows[..., 1::2, :]) / 4


def _wide(values: np.ndarray, mode: str = "constant") -> np.ndarray:
    """Adds `_MARGIN` pixels on each side of (N, 64, 64, C): zeros or, in mode "edge", copies of the edge."""
    return np.pad(values, [(0, 0), (_MARGIN, _MARGIN), (_MARGIN, _MARGIN), (0, 0)], mode=mode)
