"""Resizes and blurs pictures by a sparse matrix along each axis, several times as fast as array arithmetic in NumPy.

Pictures are (H, W, 3) of any number type; results are float32. OpenCV turns pictures by 90 degrees several times as
fast as NumPy, but its own average of areas is slower than ours unless one side is a multiple of the other.
"""

import functools
import math
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from scipy.sparse import csr_array

METHODS = ("bilinear", "bicubic", "area", "antialiased_bicubic")


def apply_separable(image: np.ndarray, rows: "csr_array", columns: "csr_array") -> np.ndarray:
    """Applies the sparse matrices rows (h, H) and columns (w, W) along the axes of a picture: (H, W, 3) → (h, w, 3)."""
    height, width = image.shape[:2]
    image = (rows @ image.astype(np.float32, copy=False).reshape(height, -1)).reshape(-1, width, 3)
    image = (columns @ _turned(image).reshape(width, -1)).reshape(columns.shape[0], -1, 3)
    return _turned(image)


def _turned(image: np.ndarray) -> np.ndarray:
    """Swaps the axes of a float32 picture: (H, W, 3) → (W, H, 3)."""
    cv2 = opencv()
    return cv2.transpose(image) if cv2 else np.ascontiguousarray(image.swapaxes(0, 1))


@functools.cache
def opencv() -> ModuleType | None:
    """Returns the module cv2, or None without it: all pixels are the same then, but take longer."""
    try:
        import cv2
    except ImportError:
        return None
    return cv2


def blur_matrix(length: int, weights: np.ndarray, step: int = 1) -> "csr_array":
    """Makes the matrix (length / step, length) that sums each `step`-th pixel and its neighbours, times `weights`.

    Pixels beyond the border are mirrored. The middle of an even number of weights is half a pixel after the pixel.
    """
    taps = np.arange(0, length, step)[:, None] + np.arange(len(weights)) - (len(weights) - 1) // 2
    return _matrix(_mirrored(taps, length, 0), np.broadcast_to(weights, taps.shape), length)


@functools.lru_cache(maxsize=512)  # sides of random crops, some 10 KB each
def resize_matrix(length: int, size: int, method: str) -> "csr_array":
    """Makes the matrix (size, length) that resizes `length` pixels to `size`, with pixels' centres at half-integers.

    method, one of METHODS: "bilinear" and "bicubic" (a = -0.75) interpolate between the nearest 2 or 4 pixels and
    repeat border pixels, as OpenCV does; a much smaller picture then skips pixels. "area" takes the mean of the area
    that a new pixel covers. "antialiased_bicubic" (a = -0.5) is MATLAB's imresize: a wider kernel for a smaller
    picture, the border mirrored. Raises ValueError for other methods.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r} of resizing: expected one of {', '.join(METHODS)}")
    scale = length / size
    if method == "area":
        low = np.arange(size)[:, None] * scale
        taps = np.floor(low) + np.arange(math.ceil(scale) + 1)
        weights = np.maximum(np.minimum(low + scale, taps + 1) - np.maximum(low, taps), 0)
    else:
        stretch = max(1, scale) if method == "antialiased_bicubic" else 1
        reach = stretch if method == "bilinear" else 2 * stretch
        centre = (np.arange(size)[:, None] + 0.5) * scale - 0.5
        taps = np.floor(centre - reach) + 1 + np.arange(math.ceil(2 * reach))
        distance = np.abs(centre - taps) / stretch
        if method == "bilinear":
            weights = np.maximum(1 - distance, 0)
        else:
            weights = _cubic(distance, -0.5 if method == "antialiased_bicubic" else -0.75)
    weights /= weights.sum(axis=1, keepdims=True)
    inside = _mirrored(taps, length, 1) if method == "antialiased_bicubic" else np.clip(taps, 0, length - 1)
    return _matrix(inside, weights, length)


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Evaluates Keys' cubic kernel at distances x >= 0."""
    near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


def _mirrored(taps: np.ndarray, length: int, repeat: int) -> np.ndarray:
    """Mirrors positions beyond the border: c b | a b c | b a with repeat 0, b a | a b c | c b with repeat 1."""
    period = max(1, 2 * (length - 1 + repeat))
    taps = taps % period
    return np.minimum(taps, period - repeat - taps)


def _matrix(taps: np.ndarray, weights: np.ndarray, length: int) -> "csr_array":
    """Makes a sparse matrix (rows, length): row i weighs pixels taps[i] by weights[i]; weights of one pixel add up."""
    from scipy.sparse import csr_array

    rows, n = taps.shape
    starts = np.arange(0, rows * n + 1, n, dtype=np.int32)
    return csr_array((weights.astype(np.float32).ravel(), taps.astype(np.int32).ravel(), starts), shape=(rows, length))
