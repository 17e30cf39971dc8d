"""Reported numbers against the same by brute force, one row after the other."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shrink import fake_clip, random_batch, small_config, small_stage

from unclip_jax.stages.clip import Clip
from unclip_jax.stages.prior_diffusion import PriorDiffusion
from unclip_jax.stages.upsampler import Upsampler

ROWS = 6
RNG = np.random.default_rng(0)


def circle(*degrees):
    """Unit vectors (N, 2)."""
    return np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], axis=1)


def known_clip(z_i, z_t):
    """CLIP whose embeddings are given."""

    class KnownClip(Clip):
        def _model(self):
            pair = (jnp.asarray(z, jnp.float32) for z in (z_i, z_t))
            return SimpleNamespace(apply=lambda *_: (*pair, jnp.float32(3)))

    return KnownClip(small_config("clip"))


class KnownPrior(PriorDiffusion):
    """A prior whose drawn embeddings are given."""

    def loss(self, params, frozen, batch, key, train=True):
        return jnp.float32(0), {}

    def sample(self, params, frozen, conditions, key):
        return params["drawn"]


class CoarseUpsampler(Upsampler):
    """Draws what plain interpolation gives, darker by a tenth."""

    def loss(self, params, frozen, batch, key, train=True):
        return jnp.float32(0), {}

    def sample(self, params, frozen, conditions, key):
        return self._enlarged(conditions.low_res) - 0.1


def test_reported_metrics_are_means_over_rows():
    """DALLE2-pytorch#49: an evaluation that averaged the wrong thing; here each number is counted out by hand."""
    # On a circle: three pairs that find each other; of the last, only the picture finds its caption.
    z_i, z_t = circle(0, 90, 180, 271, 50, 40), circle(0, 90, 180, 5, 10, 15)
    clip = known_clip(z_i, z_t)
    scalars = clip.evaluate({}, {}, random_batch(small_stage("clip")[0], ROWS), jax.random.key(0))
    pictures = sum(np.argmax([z_i[k] @ z for z in z_t]) == k for k in range(ROWS))
    captions = sum(np.argmax([z_t[k] @ z for z in z_i]) == k for k in range(ROWS))
    assert (pictures, captions) == (4, 3)
    assert float(scalars["retrieval"]) == pytest.approx((pictures + captions) / (2 * ROWS))

    drawn = 2 * circle(*RNG.uniform(0, 360, ROWS))
    embeds = {name: lambda *_, z=z: jnp.asarray(z, jnp.float32) for name, z in (("images", z_i), ("texts", z_t))}
    clip = fake_clip(config=small_config("clip"), embed_images=embeds["images"], embed_texts=embeds["texts"])
    prior = KnownPrior(small_config("prior_diffusion"), clip)
    params = {"drawn": jnp.asarray(drawn, jnp.float32)}
    examples = prior.draw_examples(params, {}, random_batch(prior, ROWS), jax.random.split(jax.random.key(0), ROWS))
    scalars = prior.score_examples(examples)
    mean = z_i.mean(0) / np.linalg.norm(z_i.mean(0))
    pairs = {
        "model": [(drawn[k] / 2, z_i[k]) for k in range(ROWS)],
        "copy_text": [(z_t[k], z_i[k]) for k in range(ROWS)],
        "mean": [(mean, z_i[k]) for k in range(ROWS)],
        "shuffled_text": [(drawn[k - 1] / 2, z_i[k]) for k in range(ROWS)],
    }
    for name, rows in pairs.items():
        assert float(scalars[f"cosine_{name}"]) == pytest.approx(np.mean([a @ b for a, b in rows]), abs=1e-5)


def test_psnr_is_the_mean_of_each_pictures_own():
    """diffusers!5244, DALLE2-pytorch#49: an average over the wrong axes; PSNR of the mean error is another number."""
    config = small_config("upsampler_256").unlock()
    config.model.patch = 16
    stage = CoarseUpsampler(config.lock())
    spread = np.linspace(5, 120, ROWS).reshape(ROWS, 1, 1, 1)  # from nearly plain to noise
    truth = (128 + spread * RNG.uniform(-1, 1, (ROWS, 16, 16, 3))).astype(np.uint8)
    examples = jax.jit(stage.draw_examples)({}, {}, {"image": truth}, jax.random.split(jax.random.key(0), ROWS))
    scalars = stage.score_examples(examples)
    drawn, plain, shown = (np.asarray(examples[name], np.float64) for name in ("drawn", "interpolated", "true"))
    np.testing.assert_array_equal(shown, truth)
    for name, images in (("psnr", drawn), ("psnr_interpolated", plain)):
        each = [10 * np.log10(255**2 / np.mean((images[k] - truth[k]) ** 2)) for k in range(ROWS)]
        assert float(scalars[name]) == pytest.approx(np.mean(each), abs=1e-3)
