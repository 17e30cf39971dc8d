"""Random masks that train a network to inpaint (GLIDE, arXiv 2112.10741, section 4.3).

The paper says that "random regions are erased", but not how they are drawn: the kinds and shares here are ours.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Bool

from unclip_jax.arrays import Array, Key

ALL, RECTANGLES = 0.25, 0.45  # shares of the pictures erased whole, and by rectangles; the others by a stroke
COUNT = 4  # most rectangles in a picture, and lines in a stroke
SIDES = (0.1, 0.8)  # range of a rectangle's sides, as shares of the picture's side
THICKNESS = (0.1, 0.25)  # range of a stroke's thickness, likewise


def random_known(key: Key, rows: int, size: int) -> Bool[Array, "{rows} {size} {size} 1"]:
    """Draws one mask per row, independently: True where the pixel is known. key: one, or keys (rows,).

    25 % of the masks know no pixel, as in drawing from a caption alone. 45 % know all but 1 to 4 rectangles, with sides
    of 10 to 80 % of the picture's. 30 % know all but a stroke of 1 to 4 lines, 10 to 25 % of the picture's side thick.
    """

    def known(key: Key) -> Bool[Array, "H W"]:
        key_kind, key_rectangles, key_stroke = jax.random.split(key, 3)
        kind = jax.random.uniform(key_kind)
        rectangles, stroke = _rectangles(key_rectangles, size), _stroke(key_stroke, size)
        return ~(jnp.where(kind < ALL + RECTANGLES, rectangles, stroke) | (kind < ALL))

    return jax.vmap(known)(key if key.ndim else jax.random.split(key, rows))[..., None]


def _rectangles(key: Key, size: int) -> Bool[Array, "{size} {size}"]:
    """True for the pixels of 1 to COUNT rectangles within the picture."""
    key_count, key_sides, key_corners = jax.random.split(key, 3)
    real = jnp.arange(COUNT) < jax.random.randint(key_count, (), 1, COUNT + 1)
    smallest, largest = math.ceil(SIDES[0] * size), math.floor(SIDES[1] * size)
    sides = jax.random.randint(key_sides, (2, COUNT), smallest, largest + 1)
    first = jax.random.randint(key_corners, (2, COUNT), 0, size - sides + 1)[..., None]
    pixels = jnp.arange(size)[None, None]
    rows, columns = (first <= pixels) & (pixels < first + sides[..., None])
    return jnp.any(rows[:, :, None] & columns[:, None, :] & real[:, None, None], axis=0)


def _stroke(key: Key, size: int) -> Bool[Array, "{size} {size}"]:
    """True for the pixels near one of 1 to COUNT straight lines, each of which starts where the last one ends."""
    key_count, key_points, key_thickness = jax.random.split(key, 3)
    real = jnp.arange(COUNT) < jax.random.randint(key_count, (), 1, COUNT + 1)
    points = jax.random.uniform(key_points, (COUNT + 1, 2), maxval=float(size))
    start, way = (part[..., None, None] for part in (points[:-1], points[1:] - points[:-1]))  # (COUNT, 2, 1, 1)
    centres = jnp.arange(size, dtype=jnp.float32) + 0.5
    down, right = centres[None, :, None] - start[:, 0], centres[None, None, :] - start[:, 1]
    share = (down * way[:, 0] + right * way[:, 1]) / jnp.maximum(jnp.sum(way**2, axis=1), 1e-6)
    share = jnp.clip(share, 0.0, 1.0)  # of the way to the nearest point of the line
    squared_distance = (down - share * way[:, 0]) ** 2 + (right - share * way[:, 1]) ** 2
    radius = 0.5 * size * jax.random.uniform(key_thickness, minval=THICKNESS[0], maxval=THICKNESS[1])
    near = squared_distance <= jnp.maximum(radius, 0.75) ** 2  # in pixels: no stroke slips between their centres
    return jnp.any(near & real[:, None, None], axis=0)
