"""What other code bases got wrong about the decoder: what dropping leaves standing, and how often it drops."""

import inspect
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from shrink import fake_clip, random_batch, small_config, small_stage

from unclip_jax.stages.conditions import Conditions, captions
from unclip_jax.stages.decoder import Decoder

ROWS = 2


class Listener(Decoder):
    """In place of the U-Net: numbers in which all that a U-Net would be told besides x_t and t can be heard."""

    def _unet(self):
        def apply(variables, x, t, *conditioning, **options):
            heard = sum(jnp.mean(part.reshape(len(x), -1), axis=1) for part in jax.tree.leaves(conditioning))
            return jnp.broadcast_to(jnp.sin(10 * heard)[:, None, None, None], x.shape)

        return SimpleNamespace(apply=apply)


def test_unconditional_decoder_is_told_nothing_of_the_embedding():
    """DALLE2-pytorch#144: dropped from the tokens, the embedding still came in with the timestep's."""
    config = small_config("decoder").unlock()
    config.diffusion.update(dict(drop_embedding=1.0, drop_caption=0.0))
    dim = config.model.embedding_dim
    embed = lambda frozen, images: images.reshape(len(images), -1)[:, :dim].astype(jnp.float32) / 255  # noqa: E731
    stage = Listener(config.lock(), fake_clip(config=small_config("clip"), embed_images=embed))
    params = {"conditioner": small_stage("decoder")[2]["conditioner"], "unet": {}}
    batch = random_batch(stage, ROWS)
    conditions = Conditions(**captions(batch))
    z, other = jax.random.normal(jax.random.key(0), (2, ROWS, dim))

    @jax.jit
    def draw(scale, z):
        given = conditions._replace(image_embedding=z, guidance_scale=scale)
        return stage.sample(params, {}, given, jax.random.key(1))

    null, conditional = jnp.float32(0.0), jnp.float32(1.0)
    np.testing.assert_array_equal(draw(null, z), draw(null, other))
    assert float(jnp.abs(draw(conditional, z) - draw(conditional, other)).max()) > 1e-3

    loss = jax.jit(lambda batch: stage.loss(params, {}, batch, jax.random.key(2))[0])
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
