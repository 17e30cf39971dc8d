"""What other code bases got wrong about the decoder: what dropping leaves standing, and how often it drops."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
from shrink import random_batch, random_params, small_config, small_stage

from unclip_jax.stages import make_stage

ROWS = 2


@functools.cache
def decoder():
    """(stage, frozen, params) of one level of resolution, that no embedding ever reaches in training."""
    stage, frozen, _ = small_stage("decoder")
    config = small_config("decoder").unlock()
    config.model.unet.update(dict(channel_mult=(1,), attention=(1,)))
    config.diffusion.drop_embedding = 1.0
    stage = make_stage(config.lock(), stage.clip)
    return stage, frozen, random_params(stage)


def test_unconditional_decoder_is_told_nothing_of_the_embedding():
    """DALLE2-pytorch#144: dropped from the tokens, the embedding still came in with the timestep's."""
    stage, frozen, params = decoder()
    batch = random_batch(stage, ROWS)
    captions = {name: value for name, value in batch.items() if "tokens" in name}
    z, other = jax.random.normal(jax.random.key(0), (2, ROWS, stage.config.model.embedding_dim))

    @jax.jit
    def draw(scale, z):
        conditions = captions | {"image_embedding": z, "guidance_scale": scale}
        return stage.sample(params, frozen, conditions, jax.random.key(1))

    np.testing.assert_array_equal(draw(jnp.float32(0.0), z), draw(jnp.float32(0.0), other))
    assert float(jnp.abs(draw(jnp.float32(1.0), z) - draw(jnp.float32(1.0), other)).max()) > 1e-3

    loss = jax.jit(lambda batch: stage.loss(params, frozen, batch, jax.random.key(2))[0])
    np.testing.assert_array_equal(loss(batch), loss(batch | {"clip_image": 255 - batch["clip_image"]}))


def test_embedding_and_caption_are_dropped_each_at_its_own_rate(monkeypatch):
    """DALLE2-pytorch#38: one probability for both, where the paper drops 10 % of embeddings and 50 % of captions."""
    stage, frozen, params = small_stage("decoder")
    rows, seen = 4096, {}
    condition = type(stage).condition

    def listening(self, *args):
        seen.update(inspect.signature(condition).bind(self, *args).arguments)
        return condition(self, *args)

    monkeypatch.setattr(type(stage), "condition", listening)

    @jax.jit
    def kept(key):
        stage.loss(params, frozen, random_batch(stage, rows), key)
        return seen["has_embedding"], seen["has_caption"]

    embedding, caption = (np.asarray(has) for has in kept(jax.random.key(0)))
    for has, rate in ((embedding, 0.9), (caption, 0.5), (embedding & caption, 0.45)):
        assert has.shape == (rows,) and abs(has.mean() - rate) < 4 * (rate * (1 - rate) / rows) ** 0.5
