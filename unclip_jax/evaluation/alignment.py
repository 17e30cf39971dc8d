"""Measures whether a picture of an emoji scene shows what its caption asks for, without any network.

The drawings are known, so the object is the drawing nearest to the picture, once put in the asked-for place on the
picture's own background; the background is the named colour nearest to the picture's border.
"""

import functools

import numpy as np

from unclip_jax.data import emoji_scenes
from unclip_jax.evaluation.intervals import Result, wilson

_GRID = 16  # cells a side to which pictures and drawings are averaged: so few that a small shift changes little
_FILL = 0.875  # side of a drawing, as a share of the window that is compared
_SHIFTS = (-0.02, 0.0, 0.02)  # by which an object may be out of its place, right and down; fractions of the frame
_CHUNK = 64  # pictures compared at once


def chance() -> dict[str, float]:
    """Computes the average `score` of pictures drawn without regard to their captions."""
    per_object, per_background = 1 / len(emoji_scenes.objects()), 1 / len(emoji_scenes.colours())
    return {"object": per_object, "background": per_background, "both": per_object * per_background}


def classify(images: np.ndarray) -> tuple[list[str], list[str]]:
    """Names the object in the middle and the background of each picture, uint8 RGB (N, S, S, 3).

    The data set's own pictures are classified without error from S = 16 on.
    """
    backgrounds = _border(images)
    palette = np.array(list(emoji_scenes.colours().values()), np.float32)
    distances = np.square(backgrounds[:, None, :] - palette[None, :, :]).sum(axis=-1)
    names = list(emoji_scenes.colours())
    found = _nearest_drawing(images, backgrounds, (0.5, 0.5), emoji_scenes.SINGLE_SIDE)
    return found, [names[k] for k in distances.argmin(axis=1)]


def score(images: np.ndarray, objects: list[str], colours: list[str]) -> dict[str, Result]:
    """Shares of the pictures, uint8 RGB (N, S, S, 3), whose object, background and both are those asked for."""
    found_objects, found_colours = classify(images)
    object_right = np.array(found_objects) == np.array(objects)
    background_right = np.array(found_colours) == np.array(colours)
    return _shares(object=object_right, background=background_right, both=object_right & background_right)


def score_pairs(images: np.ndarray, objects: list[str], relations: list[str], others: list[str]) -> dict[str, Result]:
    """Shares of the pictures, uint8 RGB (N, S, S, 3), in which the objects of a caption stand in their places.

    The caption is "OBJECT RELATION OTHER", for example "… left of …". The data set's own pictures are scored without
    error from S = 24 on.
    """
    backgrounds = _border(images)
    right = np.zeros((2, len(images)), bool)
    for relation in sorted(set(relations)):
        rows = [n for n, asked in enumerate(relations) if asked == relation]
        for which, (names, place) in enumerate(zip((objects, others), emoji_scenes.places(relation), strict=True)):
            found = _nearest_drawing(images[rows], backgrounds[rows], place, emoji_scenes.PAIR_SIDE)
            right[which, rows] = [name == names[n] for name, n in zip(found, rows, strict=True)]
    return _shares(object=right[0], other=right[1], both=right.all(0))


def _shares(**right: np.ndarray) -> dict[str, Result]:
    """Shares of True with Wilson's intervals, by name."""
    card = {"reader": "nearest drawing", "interval": "Wilson's, over the pictures"}
    return {
        name: Result(f"alignment, {name}", float(hits.mean()), *wilson(int(hits.sum()), len(hits)), len(hits), card)
        for name, hits in right.items()
    }


def _border(images: np.ndarray) -> np.ndarray:
    """Median colour of a thin frame: float32 (N, 3)."""
    width = max(1, images.shape[1] // 32)
    frame = np.ones(images.shape[1:3], bool)
    frame[width:-width, width:-width] = False
    return np.median(images[:, frame], axis=1).astype(np.float32)


def _nearest_drawing(images: np.ndarray, backgrounds: np.ndarray, place: tuple[float, float], side: float) -> list[str]:
    """Finds the drawing nearest to each picture at a place (its middle, right and down), in fractions of the frame."""
    names = emoji_scenes.objects()
    colour, opaque = _drawings()
    found = []
    for start in range(0, len(images), _CHUNK):
        pictures = images[start : start + _CHUNK].astype(np.float32)
        plain = backgrounds[start : start + _CHUNK, None, None, None, :]
        expected = colour[None] + (1 - opaque[None]) * plain
        nearest = np.full((len(pictures), len(names)), np.inf, np.float32)
        for down in _SHIFTS:
            rows = np.tensordot(_averaging(images.shape[1], place[1] + down, side / _FILL), pictures, (1, 1))
            for right in _SHIFTS:
                seen = np.tensordot(_averaging(images.shape[1], place[0] + right, side / _FILL), rows, (1, 2))
                seen = seen.transpose(2, 1, 0, 3)[:, None]
                nearest = np.minimum(nearest, np.square(seen - expected).mean(axis=(2, 3, 4)))
        found += [names[k] for k in nearest.argmin(axis=1)]
    return found


def _averaging(size: int, middle: float, side: float) -> np.ndarray:
    """Float32 (_GRID, size): averages the window of `side` around `middle` to _GRID values, by area."""
    edges = size * (middle + side * (np.arange(_GRID + 1) / _GRID - 0.5))
    pixels = np.arange(size)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return (np.clip(overlap, 0, None) * _GRID / (side * size)).astype(np.float32)


@functools.cache
def _drawings() -> tuple[np.ndarray, np.ndarray]:
    """All drawings in their window: colours times opacity (objects, _GRID, _GRID, 3), 0-255; opacity (..., 1), 0-1."""
    fine = 16  # pixels per grid cell
    inner = round(_FILL * _GRID * fine)
    margin = (_GRID * fine - inner) // 2
    canvas = np.zeros((len(emoji_scenes.objects()), _GRID * fine, _GRID * fine, 4), np.float32)
    for k, name in enumerate(emoji_scenes.objects()):
        canvas[k, margin : margin + inner, margin : margin + inner] = emoji_scenes.draw(name, inner)
    canvas[..., 3] /= 255
    canvas[..., :3] *= canvas[..., 3:]
    cells = canvas.reshape(len(canvas), _GRID, fine, _GRID, fine, 4).mean(axis=(2, 4))
    return cells[..., :3], cells[..., 3:]
