"""Blur and resizing against hand-computed values, PIL, and torch's documented kernels."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from PIL import Image

from unclip_jax.diffusion.corruption import area_downsample, gaussian_blur, maybe_blur, upsample

KEY = jax.random.key(0)


def impulse(size, row, column):
    return jnp.zeros((1, size, size, 1)).at[0, row, column, 0].set(1.0)


def test_blur_kernel_of_the_paper():
    """sigma 0.6: [0.16638, 0.66724, 0.16638] in each direction."""
    taps = np.array([0.16638, 0.66724, 0.16638])
    blurred = np.asarray(gaussian_blur(impulse(5, 2, 2), 0.6))[0, :, :, 0]
    np.testing.assert_allclose(blurred[1:4, 1:4], np.outer(taps, taps), atol=1e-5)
    assert blurred.sum() == pytest.approx(1, abs=1e-6)


def test_blur_mirrors_without_repeating_the_border():
    blurred = np.asarray(gaussian_blur(impulse(4, 1, 2), 0.6))[0, :, :, 0]
    np.testing.assert_allclose(blurred[0, 2], 2 * 0.16638 * 0.66724, atol=1e-5)
    np.testing.assert_allclose(gaussian_blur(jnp.full((1, 3, 3, 2), 0.4), 0.6), 0.4, rtol=1e-6)


def test_blur_is_drawn_for_each_image_at_its_rate():
    """Neither always, nor for the whole batch at once."""
    images = jnp.broadcast_to(impulse(3, 1, 1), (2000, 3, 3, 1))
    blurred = np.asarray(maybe_blur(KEY, images, 0.3, 0.6))[:, 1, 1, 0] < 1
    assert blurred.mean() == pytest.approx(0.3, abs=0.03)
    np.testing.assert_array_equal(maybe_blur(KEY, images, 0.0, 0.6), images)
    np.testing.assert_array_equal(maybe_blur(KEY, images, 1.0, 0.6), gaussian_blur(images, 0.6))


def test_area_downsample_averages_blocks():
    image = jnp.arange(24, dtype=jnp.float32).reshape(1, 4, 6, 1)
    np.testing.assert_array_equal(area_downsample(image, 2)[0, :, :, 0], [[3.5, 5.5, 7.5], [15.5, 17.5, 19.5]])
    with pytest.raises(ValueError, match="4x6 pixels cannot be divided by 4"):
        area_downsample(image, 4)


def test_bilinear_by_hand():
    """Half-pixel centres: outputs lie a quarter of a pixel to either side of inputs; the border repeats."""
    row = jnp.array([0.0, 1.0, 4.0]).reshape(1, 1, 3, 1)
    np.testing.assert_allclose(upsample(row, (1, 6), "bilinear").ravel(), [0, 0.25, 0.75, 1.75, 3.25, 4], rtol=1e-6)
    np.testing.assert_allclose(upsample(jnp.swapaxes(row, 1, 2), (6, 1), "bilinear").ravel(),
                               [0, 0.25, 0.75, 1.75, 3.25, 4], rtol=1e-6)


def test_bicubic_by_hand():
    """torch's kernel (a = -0.75) at distances 1.75, 0.75, 0.25, 1.25, with the border repeated."""
    taps = np.array([-0.03515625, 0.26171875, 0.87890625, -0.10546875])
    image = np.array([0.0, 1.0, 4.0, -2.0])
    padded = np.pad(image, 2, mode="edge")
    expected = []
    for k in range(4):
        window = padded[k : k + 5]
        expected += [window[:4] @ taps, window[1:] @ taps[::-1]]
    ours = upsample(jnp.asarray(image, jnp.float32).reshape(1, 1, 4, 1), (1, 8), "bicubic").ravel()
    np.testing.assert_allclose(ours, expected, atol=1e-6)


class TestAgainstPIL(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.product(
        method=[("bilinear", Image.Resampling.BILINEAR), ("antialiased_bicubic", Image.Resampling.BICUBIC)],
        size=[(20, 28), (11, 9)],
    )
    def test_upsample(self, method, size):
        name, resample = method
        image = np.random.default_rng(0).uniform(-1, 1, (5, 7)).astype(np.float32)
        expected = np.asarray(Image.fromarray(image).resize((size[1], size[0]), resample))
        ours = self.variant(functools.partial(upsample, size=size, method=name))(jnp.asarray(image)[None, :, :, None])
        np.testing.assert_allclose(ours[0, :, :, 0], expected, atol=2e-6)


@pytest.mark.parametrize("method", ["bilinear", "bicubic", "antialiased_bicubic"])
def test_upsampling_keeps_batch_and_channels_apart(method):
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 4, 4, 3)), jnp.float32)
    together = upsample(images, 8, method)
    assert together.shape == (2, 8, 8, 3) and together.dtype == jnp.float32
    for b in range(2):
        for c in range(3):
            alone = upsample(images[b : b + 1, :, :, c : c + 1], 8, method)
            np.testing.assert_allclose(together[b, :, :, c], alone[0, :, :, 0], atol=1e-6)


def test_wrong_requests_are_refused():
    with pytest.raises(ValueError, match="at least as large"):
        upsample(jnp.zeros((1, 8, 8, 3)), 4, "bilinear")
    with pytest.raises(ValueError, match="expected one of bilinear, bicubic"):
        upsample(jnp.zeros((1, 8, 8, 3)), 16, "nearest")
