"""Corruption of an upsampler's low-resolution input. Images are float32 in any range."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from unclip_jax.arrays import Array, Key, Scalar

UPSAMPLING = ("bilinear", "bicubic", "antialiased_bicubic")

Images = Float[Array, "B H W C"]


def gaussian_blur(images: Images, sigma: Scalar) -> Images:
    """Blurs by a separable 3-tap Gaussian of standard deviation `sigma` pixels.

    Images continue beyond their border mirrored, without repeating the border pixels.
    """
    side = jnp.exp(-0.5 / jnp.square(jnp.asarray(sigma, jnp.float32)))
    side, centre = side / (1 + 2 * side), 1 / (1 + 2 * side)
    padded = jnp.pad(images, ((0, 0), (1, 1), (0, 0), (0, 0)), mode="reflect")
    images = centre * images + side * (padded[:, :-2] + padded[:, 2:])
    padded = jnp.pad(images, ((0, 0), (0, 0), (1, 1), (0, 0)), mode="reflect")
    return centre * images + side * (padded[:, :, :-2] + padded[:, :, 2:])


def maybe_blur(key: Key, images: Images, probability: Scalar, sigma: Scalar) -> Images:
    """Blurs each image of the batch with the given probability, independently of the others."""
    chosen = jax.random.bernoulli(key, probability, (images.shape[0], 1, 1, 1))
    return jnp.where(chosen, gaussian_blur(images, sigma), images)


def area_downsample(images: Images, factor: int) -> Float[Array, "B H//{factor} W//{factor} C"]:
    """Means of factor x factor blocks. Raises ValueError when the image is not made of whole blocks."""
    b, h, w, c = images.shape
    if h % factor or w % factor:
        raise ValueError(f"images of {h}x{w} pixels cannot be divided by {factor}: expected multiples of {factor}")
    return jnp.mean(images.reshape(b, h // factor, factor, w // factor, factor, c), axis=(2, 4))


def upsample(images: Images, size: int | tuple[int, int], method: str) -> Float[Array, "B height width C"]:
    """Enlarges to `size` (height, width; one number for both) with half-pixel centres.

    "bilinear", "bicubic": as torch.nn.functional.interpolate(align_corners=False): cubic kernel with a = -0.75,
      border pixels repeated.
    "antialiased_bicubic": as interpolate(antialias=True) and PIL: a = -0.5, the kernel cut off at the border.

    Raises ValueError for a smaller size and an unknown method.
    """
    b, h, w, c = images.shape
    height, width = (size, size) if isinstance(size, int) else size
    if height < h or width < w:
        raise ValueError(f"upsampling {h}x{w} images to {height}x{width}: expected a size at least as large")
    if method == "antialiased_bicubic":
        return jax.image.resize(images, (b, height, width, c), "cubic", precision=jax.lax.Precision.HIGHEST)
    rows, columns = _resize_matrix(h, height, method), _resize_matrix(w, width, method)
    # Both products in full precision: a TPU's default would round pixels to 8 bits of mantissa.
    images = jnp.einsum("Hh,bhwc->bHwc", rows, images, precision=jax.lax.Precision.HIGHEST)
    return jnp.einsum("Ww,bhwc->bhWc", columns, images, precision=jax.lax.Precision.HIGHEST)


def _resize_matrix(length: int, size: int, method: str) -> Float[np.ndarray, "{size} {length}"]:
    """Weights of every input pixel in every output pixel along one axis."""
    if method not in UPSAMPLING:
        raise ValueError(f"unknown upsampling method {method!r}: expected one of {', '.join(UPSAMPLING)}")
    reach, kernel = (1, _linear_kernel) if method == "bilinear" else (2, _cubic_kernel)
    matrix = np.zeros((size, length))
    for row in range(size):
        centre = (row + 0.5) * length / size - 0.5
        for tap in range(math.floor(centre) - reach + 1, math.floor(centre) + reach + 1):
            matrix[row, min(max(tap, 0), length - 1)] += kernel(abs(centre - tap))
    return matrix.astype(np.float32)


def _linear_kernel(x: float) -> float:
    return max(0.0, 1 - x)


def _cubic_kernel(x: float, a: float = -0.75) -> float:
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4)
