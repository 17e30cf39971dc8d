"""What other code bases got wrong about editing: the noise along a path, and which part of a mask is made anew."""

import jax
import jax.numpy as jnp
import numpy as np
from shrink import small_config

from unclip_jax.cascade import Cascade
from unclip_jax.stages.base import draw
from unclip_jax.stages.conditions import Conditions

RNG = np.random.default_rng(0)


class Path(Cascade):
    """A cascade whose halves of a picture are given, and which tells the halves that it would draw from."""

    def __init__(self):
        self.halves = RNG.normal(size=(2, 8)), RNG.normal(size=(2, 4, 4, 3))

    def encode(self, pictures, steps):
        return tuple(half[: len(pictures)] for half in self.halves)

    def text_embeddings(self, texts):
        return np.eye(8)[: len(texts)]

    def redraw(self, embeddings, x_T, seed, eta=0.0, **options):
        return embeddings, np.asarray(x_T)


def test_frames_of_a_path_share_their_noise():
    """diffusers!3782: each frame of an interpolation was drawn from fresh noise, and the frames did not connect."""
    path = Path()
    for embeddings, x_T in (path.interpolate("a", "b", 5, 0, inverted=False), path.text_diff("a", "", "", 0.4, 5, 0)):
        assert len(np.unique(embeddings[:, 0])) == 5 and len(x_T) == 5
        np.testing.assert_array_equal(x_T, np.repeat(x_T[:1], 5, axis=0))
    embeddings, x_T = path.interpolate("a", "b", 5, 0)
    for ends, frames in zip(path.halves, (embeddings, x_T), strict=True):
        np.testing.assert_allclose(frames[[0, -1]], ends, atol=1e-12)
        steps = np.linalg.norm(np.diff(frames.reshape(5, -1), axis=0), axis=1)
        assert steps.max() < 0.5 * np.linalg.norm(ends[1] - ends[0])  # fresh noise is as far as the other end
    _, again = path.interpolate("a", "b", 3, 1)
    np.testing.assert_allclose(again[1], x_T[2], atol=1e-12)


def test_known_pixels_stay_and_the_others_are_made_anew():
    """diffusers!4207: what a mask marks was kept by one pipeline and painted over by another."""
    config = small_config("decoder").unlock()
    config.diffusion.update(dict(predicts="x0", learned_variance=False))
    known = np.zeros((1, 4, 4, 1), bool)
    known[:, :2] = True
    conditions = Conditions(known=known, known_image=np.full((1, 4, 4, 3), -0.7, np.float32))
    for inpaints in (False, True):
        paint = jax.jit(
            lambda key, inpaints=inpaints: draw(
                config, lambda x_t, t: jnp.full_like(x_t, 0.3), (1, 4, 4, 3), conditions, key, network_inpaints=inpaints
            )
        )
        drawn = np.asarray(paint(jax.random.key(0)))
        np.testing.assert_allclose(drawn[:, :2], -0.7, atol=1e-6)
        np.testing.assert_allclose(drawn[:, 2:], 0.3, atol=1e-6)
