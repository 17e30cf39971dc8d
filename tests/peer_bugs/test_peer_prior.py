"""What other code bases got wrong about the prior: what it must hear, what is dropped, at what scale it diffuses."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shrink import fake_clip, random_batch, random_params, small_config, small_stage

from unclip_jax import cli
from unclip_jax.models.clip import normalize
from unclip_jax.stages import make_stage
from unclip_jax.stages.conditions import Conditions
from unclip_jax.stages.prior_diffusion import PriorDiffusion

ROWS = 3


@functools.cache
def prior():
    """(stage, frozen, params) that draws once and in one step, and that no caption ever reaches in training."""
    _, frozen, _ = small_stage("prior_diffusion")
    config = small_config("prior_diffusion").unlock()
    config.sampling.update(dict(draws=1, steps="1"))
    config.diffusion.drop_text = 1.0
    stage = make_stage(config.lock(), small_stage("prior_diffusion")[0].clip)
    return stage, frozen, random_params(stage)


@functools.cache
def drawer():
    """Jitted (guidance scale, x_T, captions, text embedding) → drawn embeddings.

    The only step's prediction is what is drawn, so x_T can be told from it only if the network hears x_t.
    """
    stage, frozen, params = prior()

    def draw(scale, x_T, captions, z_t):
        conditions = Conditions(**captions, text_embedding=z_t, guidance_scale=scale, x_T=x_T)
        return stage.sample(params, frozen, conditions, jax.random.key(0))

    return jax.jit(draw)


@functools.cache
def loss_of():
    stage, frozen, _ = prior()
    return jax.jit(lambda params, batch: stage.loss(params, frozen, batch, jax.random.key(1))[0])


def inputs(seed=0):
    """(x_T, captions, text embedding); every number differs from those of another seed."""
    captions = {name: value for name, value in random_batch(prior()[0], ROWS).items() if name.startswith("tokens")}
    captions["tokens"] = captions["tokens"] + seed
    x_T, z_t = jax.random.normal(jax.random.key(seed), (2, ROWS, prior()[0].config.model.embedding_dim))
    return x_T, captions, normalize(z_t)


def apart(one, other):
    """Distance of each row of one drawing to the same row of another: (ROWS,)."""
    return np.linalg.norm(np.asarray(one) - np.asarray(other), axis=-1)


class EchoingPrior(PriorDiffusion):
    """Answers with the noised embedding as the network is given it."""

    def _model(self):
        return SimpleNamespace(apply=lambda variables, x_t, *others: x_t)


def test_prior_hears_the_noised_embedding():
    """DALLE2-pytorch#71: the noised image embedding was missing from the transformer's tokens."""
    x_T, captions, z_t = inputs()
    draw = functools.partial(drawer(), jnp.float32(1.0))
    assert (apart(draw(x_T, captions, z_t), draw(inputs(1)[0], captions, z_t)) > 1e-3).all()


def test_prior_without_text_is_told_nothing_of_it():
    """DALLE2-pytorch#235: the mask of dropped texts was computed and not applied."""
    x_T, captions, z_t = inputs()
    _, others, z_other = inputs(1)
    null, conditional = jnp.float32(0.0), jnp.float32(1.0)
    np.testing.assert_array_equal(drawer()(null, x_T, captions, z_t), drawer()(null, x_T, others, z_other))
    for changed in ((captions, z_other), (others, z_t)):
        assert (apart(drawer()(conditional, x_T, captions, z_t), drawer()(conditional, x_T, *changed)) > 1e-3).all()

    batch = random_batch(prior()[0], ROWS)
    others = batch | {name: value + 1 for name, value in batch.items() if name.endswith("tokens")}
    np.testing.assert_array_equal(loss_of()(prior()[2], batch), loss_of()(prior()[2], others))


def test_prior_without_text_still_hears_the_noised_embedding():
    """DALLE2-pytorch's `image_cond_drop_prob` puts a null vector in place of x_t, in training and in guidance."""
    x_T, captions, z_t = inputs()
    draw = functools.partial(drawer(), jnp.float32(0.0))
    assert (apart(draw(x_T, captions, z_t), draw(inputs(1)[0], captions, z_t)) > 1e-3).all()

    def loss(drop_text):
        config = small_config("prior_diffusion").unlock()
        config.diffusion.drop_text = drop_text
        clip = fake_clip(embed_images=lambda *_: z_t, embed_texts=lambda *_: z_t)
        return EchoingPrior(config.lock(), clip).loss({}, {}, random_batch(prior()[0], ROWS), jax.random.key(0))[0]

    assert float(loss(1.0)) == float(loss(0.0))


def test_embeddings_are_diffused_at_the_scale_of_the_noise():
    """DALLE2-pytorch#60: unit vectors, whose elements are all but zero, were put into a Gaussian diffusion."""
    stage, _, params = prior()
    silent = jax.tree.map(jnp.zeros_like, params)  # predicts 0, so that its error is the mean of x0 squared
    d = stage.config.diffusion
    expected = d.embedding_scale**2 / stage.config.model.embedding_dim
    assert float(loss_of()(silent, random_batch(stage, ROWS))) == pytest.approx(expected, rel=1e-5)
    for size in ("paper", "small", "tiny"):
        config = cli.load_config(f"configs/prior_diffusion.py:{size}")
        assert 0.2 < config.diffusion.embedding_scale**2 / config.model.embedding_dim < 1.1
