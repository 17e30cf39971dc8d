"""What other code bases got wrong about the upsamplers' low-resolution input: its range, and when it is blurred."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shrink import small_config

from unclip_jax.diffusion.corruption import area_downsample, upsample
from unclip_jax.stages import make_stage
from unclip_jax.stages.conditions import Conditions
from unclip_jax.stages.upsampler import Upsampler

SIDE = 16


class Echo:
    """In place of the U-Net: answers with what it is given beside x_t, the enlarged low-resolution picture."""

    def __init__(self):
        self.beside = None

    def apply(self, variables, x, *args, **options):
        self.beside = x[..., 3:]
        return self.beside


@pytest.fixture
def echoing(monkeypatch):
    """An upsampler that predicts as x0 whatever picture it is conditioned on."""
    echo = Echo()
    monkeypatch.setattr(Upsampler, "_unet", lambda self: echo)
    config = small_config("upsampler_256").unlock()
    config.model.patch = SIDE
    config.diffusion.update(dict(predicts="x0", learned_variance=False, snr_clip=()))
    return make_stage(config.lock()), echo


def sample(stage, low_res):
    return jax.jit(stage.sample)({}, {}, Conditions(low_res=low_res), jax.random.key(0))


@pytest.mark.parametrize("degradation", ["blur", "bsr"])
def test_low_resolution_picture_has_one_range_in_training_and_sampling(echoing, degradation):
    """imagen-pytorch#124, #160, DALLE2-pytorch 972ee97: it was normalised twice, not at all, or in one of the two."""
    stage, _ = echoing
    with stage.config.unlocked():
        stage.config.diffusion.degradation = degradation
    # A plain picture stays what it is, made small, blurred and enlarged: the echo must be the target itself.
    plain = np.broadcast_to(np.array([0, 51, 255], np.uint8), (2, SIDE, SIDE, 3))
    loss, _ = jax.jit(stage.loss)({}, {}, {"image": plain, "low_res": plain[:, ::4, ::4]}, jax.random.key(0))
    assert float(loss) < 1e-9
    low_res = np.broadcast_to(np.array([-1, -0.6, 1], np.float32), (1, 4, 4, 3))
    drawn = sample(stage, low_res)
    assert drawn.shape == (1, SIDE, SIDE, 3)
    np.testing.assert_allclose(drawn, np.broadcast_to(low_res[:, :1, :1], drawn.shape), atol=1e-5)


def test_training_blurs_half_of_the_pictures_and_sampling_none(echoing):
    """DALLE2-pytorch (fixed in 95a512c, 86e692d): the paper blurs half of the pictures, the code all or none."""
    stage, echo = echoing
    rows = 2000
    images = np.random.default_rng(0).integers(0, 256, (rows, SIDE, SIDE, 3)).astype(np.uint8)
    small = area_downsample(jnp.asarray(images / 127.5 - 1, jnp.float32), 4)
    enlarge = jax.jit(functools.partial(upsample, size=SIDE, method=stage.config.model.interpolation))
    sharp = np.asarray(enlarge(small))

    @jax.jit
    def beside(key):
        stage.loss({}, {}, {"image": images}, key)
        return echo.beside

    blurred = np.abs(np.asarray(beside(jax.random.key(0))) - sharp).max(axis=(1, 2, 3)) > 0.01
    assert abs(blurred.mean() - 0.5) < 4 * 0.5 / rows**0.5
    np.testing.assert_allclose(sample(stage, small[:8]), np.clip(sharp[:8], -1, 1), atol=1e-5)
