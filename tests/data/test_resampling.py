"""Resizing and blurring by sparse matrices: against OpenCV, Pillow, SciPy and the definitions."""

import numpy as np
import pytest
import scipy.ndimage
from PIL import Image

from unclip_jax.data.resampling import METHODS, apply_separable, blur_matrix, resize_matrix

RNG = np.random.default_rng(0)
ROW = [0, 10, 50, 200, 120, 30, 90, 255]
# cv2.resize (OpenCV 5.0.0) of float32 pictures of eight such rows to n x n: INTER_LINEAR, INTER_CUBIC, INTER_AREA.
OPENCV = {
    ("bilinear", 3): [8.333, 160, 117.5],
    ("bicubic", 3): [5.093, 182.5, 118.889],
    ("area", 3): [16.25, 130, 136.875],
    ("bilinear", 5): [3, 46, 160, 36, 205.5],
    ("bicubic", 5): [0.9, 37.675, 182.5, 28.339, 211.8],
    ("area", 5): [3.75, 58.75, 160, 56.25, 193.125],
    ("bilinear", 11): [0, 5.909, 22.727, 56.818, 165.909, 160, 99.545, 34.091, 70.909, 157.5, 255],
    ("bicubic", 11): [-0.763, 1.734, 15.282, 56.7, 178.841, 182.5, 91.762, 31.221, 49.129, 162.115, 267.587],
    ("area", 11): [0, 6.25, 20, 50, 181.25, 160, 108.75, 30, 75, 151.875, 255],
}


@pytest.mark.parametrize(("method", "size"), OPENCV)
def test_resizes_as_opencv(method, size):
    np.testing.assert_allclose(resize_matrix(8, size, method) @ np.float32(ROW), OPENCV[method, size], atol=2e-3)


def test_halves_as_matlab():
    """The cubic kernel of a = -0.5, twice as wide: k(1/4), k(3/4), k(5/4), k(7/4), halved; the border mirrored."""
    taps = np.array([0.8671875, 0.2265625, -0.0703125, -0.0234375]) / 2
    kernel = np.concatenate([taps[::-1], taps])
    matrix = resize_matrix(40, 20, "antialiased_bicubic").toarray()
    np.testing.assert_allclose(matrix[7, 11:19], kernel, atol=1e-7)
    first = kernel[3:].copy()  # pixels 0 to 4; those before are 0, 1, 2 once more
    first[:3] += kernel[2::-1]
    np.testing.assert_allclose(matrix[0, :5], first, atol=1e-7)
    np.testing.assert_allclose(matrix[-1, ::-1], matrix[0], atol=1e-7)


@pytest.mark.parametrize("size", [20, 31, 13, 57])
def test_antialiased_inside_as_pillow(size):
    picture = RNG.random((40, 40)).astype(np.float32)
    expected = np.asarray(Image.fromarray(picture, "F").resize((size, size), Image.Resampling.BICUBIC))
    matrix = resize_matrix(40, size, "antialiased_bicubic")
    result = apply_separable(np.stack([picture] * 3, axis=-1), matrix, matrix)
    border = 2 * max(size, 40) // 40 + 3  # there, Pillow cuts its kernel off
    inside = (slice(border, -border),) * 2
    np.testing.assert_allclose(result[inside][..., 1], expected[inside], atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("length", "size"), [(1, 1), (1, 7), (9, 1), (256, 37), (37, 256), (64, 64), (255, 256)])
def test_plain_pictures_stay_plain(method, length, size):
    matrix = resize_matrix(length, size, method)
    assert matrix.shape == (size, length)
    np.testing.assert_allclose(matrix @ np.ones(length, np.float32), 1, atol=1e-5)
    if length == size:
        np.testing.assert_allclose(matrix.toarray(), np.eye(size), atol=1e-6)


def test_rows_and_columns():
    picture = RNG.integers(0, 256, (20, 31, 3), dtype=np.uint8)
    rows, columns = resize_matrix(20, 7, "area"), resize_matrix(31, 45, "bicubic")
    expected = np.einsum("ai,bj,ijc->abc", rows.toarray(), columns.toarray(), picture)
    result = apply_separable(picture, rows, columns)
    assert result.dtype == np.float32 and result.flags.c_contiguous
    np.testing.assert_allclose(result, expected, atol=1e-3)


@pytest.mark.parametrize("shape", [(20, 31, 3), (1, 5, 3), (5, 1, 3), (64, 64, 3)])
def test_opencv_changes_nothing(shape, without_opencv):
    picture = RNG.integers(0, 256, shape, dtype=np.uint8)
    matrices = resize_matrix(shape[0], 4, "bicubic"), resize_matrix(shape[1], 7, "area")
    fast = apply_separable(picture, *matrices)
    without_opencv()
    np.testing.assert_array_equal(apply_separable(picture, *matrices), fast)
    assert fast.flags.c_contiguous


@pytest.mark.parametrize("taps", [1, 2, 5, 6, 14])
@pytest.mark.parametrize("length", [1, 2, 5, 33])
def test_blurs_as_scipy(taps, length):
    weights, signal = RNG.random(taps), RNG.random(length)
    # Correlation; SciPy's even kernels begin a pixel earlier unless told otherwise.
    expected = scipy.ndimage.correlate1d(signal, weights, mode="mirror", origin=-1 if taps % 2 == 0 else 0)
    np.testing.assert_allclose(blur_matrix(length, weights) @ signal, expected, rtol=1e-5)
    np.testing.assert_allclose(blur_matrix(length, weights, 3) @ signal, expected[::3], rtol=1e-5)


def test_unknown_method():
    with pytest.raises(ValueError, match=r"'cubic'.*bilinear, bicubic"):
        resize_matrix(4, 2, "cubic")
