"""BSR degradation: makes pictures small with the flaws of cameras, resizing programs and JPEG files.

unCLIP's second upsampler is trained on such pictures (arXiv 2204.06125, section 2.1), so that it is robust to flaws
of the first one. The operations are BSRGAN's (arXiv 2103.14006), the strengths those of latent diffusion (arXiv
2112.10752, its `bsrgan_light`, which leaves out BSRGAN's second blur and sensor noise):

1. With factor 4, a quarter of the pictures are halved first; the factor is 2 from there on.
2. In random order: `blur`, `shrink` to a random size, `resize` to the final size (never before `shrink`), `noise`,
   and, for nine of ten, `jpeg`.
3. `jpeg`.

It runs on the host, one picture at a time. One core of a 2-core cloud machine makes 400 patches of 256 pixels a second;
experiments/benchmarks counts the cores that training needs. Pictures are float32 (H, W, 3) in [0, 1] here.
"""

import io

import numpy as np

from unclip_jax.data.resampling import apply_separable, blur_matrix, opencv, resize_matrix

# Shares of the pictures that are halved first, resized in `shrink` (the others are subsampled), compressed in step 2.
HALVED, RESIZED, COMPRESSED = 0.25, 0.8, 0.9
QUALITY = (80, 95)  # least and highest of JPEG
NOISE_LEVELS = (1, 2)  # least and highest standard deviation, in 255ths
NEGLIGIBLE = 1e-5  # sum of weights of a kernel's border that may be cut off
INTERPOLATIONS = ("bilinear", "bicubic", "area")


def degrade(image: np.ndarray, factor: int, rng: np.random.Generator) -> np.ndarray:
    """Degrades a picture, uint8 (H, W, 3), to uint8 (H // factor, W // factor, 3).

    Rows and columns that fill no whole pixel are cut off. Raises ValueError where nothing is left.
    """
    height, width = (side // factor for side in image.shape[:2])
    if not (height and width):
        raise ValueError(f"a picture of shape {image.shape} cannot be divided by {factor}")
    image = image[: height * factor, : width * factor] * np.float32(1 / 255)
    if factor == 4 and rng.random() < HALVED:
        method = "antialiased_bicubic" if rng.random() < 0.5 else _interpolation(rng)
        image, factor = resize(image, (2 * height, 2 * width), method), 2

    # All steps in random order, but `shrink` (0) before `resize` (1).
    steps = [
        lambda image: shrink(image, factor, rng),
        lambda image: resize(image, (height, width), _interpolation(rng)),
        lambda image: blur(image, factor, rng),
        lambda image: noise(image, rng),
        lambda image: jpeg(image, rng) if rng.random() < COMPRESSED else image,
    ]
    order = rng.permutation(len(steps)).tolist()
    first, second = sorted((order.index(0), order.index(1)))
    order[first], order[second] = 0, 1
    for step in order:
        image = steps[step](image)
    return _to_uint8(jpeg(image, rng))


def blur(image: np.ndarray, factor: int, rng: np.random.Generator) -> np.ndarray:
    """Convolves a picture with a random Gaussian: half of them elongated in a random direction, half round and smaller.

    Kernels grow with `factor`, by which the picture will be divided.
    """
    height, width = image.shape[:2]
    if rng.random() < 0.5:
        size = rng.integers(5, 15)
        variances = (4 + factor) / 4 * (1 - rng.random(2))  # 1 - U[0, 1): never zero
        kernel = gaussian_kernel(size, np.pi * rng.random(), *variances)
        return _convolve(image, kernel)
    size = rng.integers(5, 8)
    std = (2 + 0.2 * factor) / 4 * (1 - rng.random())
    weights = _normalized(-0.5 * ((np.arange(size) - (size - 1) / 2) / std) ** 2)
    return apply_separable(image, blur_matrix(height, weights), blur_matrix(width, weights))


def gaussian_kernel(size: int, angle: float, along: float, across: float) -> np.ndarray:
    """Makes a Gaussian kernel, (size, size) [y, x], around its middle, of sum 1.

    angle: direction in radians. along, across: variances in that direction and across it, in square pixels.
    """
    x = np.arange(size) - (size - 1) / 2
    y = x[:, None]
    u, v = x * np.cos(angle) + y * np.sin(angle), x * np.sin(angle) - y * np.cos(angle)
    return _normalized(-0.5 * (u**2 / along + v**2 / across))


def shrink(image: np.ndarray, factor: int, rng: np.random.Generator) -> np.ndarray:
    """Makes a picture smaller: to a random size, down to 1 / (2 factor), or blurred and every factor-th pixel taken."""
    height, width = image.shape[:2]
    if rng.random() < RESIZED:
        scale = 1 / rng.uniform(1, 2 * factor)
        return resize(image, (max(1, int(scale * height)), max(1, int(scale * width))), _interpolation(rng))
    weights = sampling_kernel(factor, rng.uniform(0.1, 0.6 * factor))
    return np.clip(apply_separable(image, *(blur_matrix(n, weights, factor) for n in (height, width))), 0, 1)


def sampling_kernel(factor: int, std: float) -> np.ndarray:
    """Makes a Gaussian of 25 pixels, of sum 1, around the middle of the `factor` pixels that become one.

    It is moved there, by (factor - 1) / 2, with linear interpolation, which makes it a little wider where the middle
    lies between two pixels. std: in pixels.
    """
    places = np.arange(25) - 12
    weights = np.interp(places - (factor - 1) / 2, places, np.exp(-0.5 * (places / std) ** 2))
    return weights / weights.sum()


def resize(image: np.ndarray, size: tuple[int, int], method: str) -> np.ndarray:
    """Resizes a picture to `size` (height, width) by a method of `resize_matrix`, and clips it to [0, 1]."""
    rows, columns = (resize_matrix(n, m, method) for n, m in zip(image.shape, size, strict=False))
    return np.clip(apply_separable(image, rows, columns), 0, 1)


def noise(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Adds Gaussian noise: to 40 % of pictures grey, to 40 % of independent colours, to 20 % of correlated colours.

    The result is clipped to [0, 1].
    """
    level, kind = rng.integers(NOISE_LEVELS[0], NOISE_LEVELS[1] + 1) / 255, rng.random()
    planes = 1 if kind < 0.4 else 3
    drawn = rng.standard_normal((*image.shape[:2], planes), dtype=np.float32)
    if 0.4 <= kind < 0.6:
        drawn = drawn @ noise_root(rng).astype(np.float32).T
    else:
        drawn *= np.float32(level)
    return np.clip(image + drawn, 0, 1)


def noise_root(rng: np.random.Generator) -> np.ndarray:
    """Draws a matrix R (3, 3), where R Rᵀ is the covariance |L² Uᵀ D U| of correlated colours.

    L is the highest noise level, U a random orthogonal matrix, D a random diagonal one with entries in [0, 1).
    """
    basis = np.linalg.svd(rng.random((3, 3)))[0]
    covariance = np.abs((NOISE_LEVELS[1] / 255) ** 2 * basis.T @ np.diag(rng.random(3)) @ basis)
    variances, directions = np.linalg.eigh(covariance)
    return directions * np.sqrt(np.maximum(variances, 0))


def jpeg(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Compresses a picture as a JPEG file of random quality, and decodes it."""
    quality = int(rng.integers(QUALITY[0], QUALITY[1] + 1))
    return _through_jpeg(_to_uint8(image), quality) * np.float32(1 / 255)


def _through_jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """Compresses a picture as a JPEG file, its colours at half of its size, and decodes it: uint8 to uint8."""
    if cv2 := opencv():  # a third of Pillow's time for the same pixels
        _, file = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
        return cv2.imdecode(file, cv2.IMREAD_COLOR_RGB)
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return np.asarray(Image.open(buffer))


def _interpolation(rng: np.random.Generator) -> str:
    """Draws one of INTERPOLATIONS."""
    return INTERPOLATIONS[rng.integers(len(INTERPOLATIONS))]


def _to_uint8(image: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(image, 0, 1) * np.float32(255)).astype(np.uint8)


def _normalized(exponents: np.ndarray) -> np.ndarray:
    """Returns exp(exponents), divided by their sum."""
    weights = np.exp(exponents - exponents.max())  # else the narrowest Gaussians would be zero everywhere
    return weights / weights.sum()


def _convolve(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Convolves a picture with a symmetric kernel of sum 1, the border mirrored, one column of the kernel at a time."""
    height, width = image.shape[:2]
    cut_y, cut_x = (np.searchsorted(np.cumsum(kernel.sum(axis)), NEGLIGIBLE) for axis in (1, 0))
    kernel = kernel[cut_y : len(kernel) - cut_y, cut_x : len(kernel) - cut_x]
    n = kernel.shape[1]
    padded = np.pad(image, ((0, 0), ((n - 1) // 2, n // 2), (0, 0)), mode="reflect").reshape(height, -1)
    matrix = blur_matrix(height, kernel[:, 0])
    result = np.zeros_like(image)
    for j, weights in enumerate(kernel.T.astype(np.float32)):
        matrix.data = np.tile(weights, height)
        result += (matrix @ padded).reshape(height, -1, 3)[:, j : j + width]
    return result
