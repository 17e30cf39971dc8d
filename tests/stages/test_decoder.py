"""The decoder of text embeddings, unCLIP's test of what its prior is for: what it reads, and what it never does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shrink import random_batch, random_params, small_config, small_stage

from unclip_jax.config_checks import check_config
from unclip_jax.errors import UserError
from unclip_jax.stages import make_stage
from unclip_jax.stages.conditions import Conditions, captions


def of_text(**model):
    """The tiny decoder, shrunk, trained on embeddings of captions: (stage, CLIP's parameters, parameters)."""
    config = small_config("decoder").unlock()
    config.model.update(dict(embedding="text") | model)
    stage = make_stage(config.lock(), small_stage("clip")[0])
    return stage, small_stage("decoder")[1], random_params(stage)


@pytest.mark.parametrize("caption", ["own", "clip"])
def test_it_reads_captions_alone(caption):
    """No batch has a picture for CLIP; CLIP's tokens are there, whoever else reads the caption."""
    stage, _, _ = of_text(caption=caption)
    assert stage.images == {"image": 8} and stage.runs_clip
    assert stage.texts.keys() == ({"tokens", "clip_tokens"} if caption == "own" else {"clip_tokens"})


@pytest.mark.slow
def test_its_loss_is_that_of_a_decoder_whose_pictures_have_these_embeddings():
    """A decoder of image embeddings that are stored, and are the captions', has the same loss."""
    stage, frozen, params = of_text()
    stored = make_stage(small_stage("decoder")[0].config, stage.clip, embedded=True)
    batch = random_batch(stage, 16)
    z_t = stage.clip.embed_texts(frozen, batch["clip_tokens"], batch["clip_tokens_length"])
    for train in (True, False):
        loss = jax.jit(lambda b, train=train: stage.loss(params, frozen, b, jax.random.key(0), train)[0])
        other = jax.jit(lambda b, train=train: stored.loss(params, {}, b, jax.random.key(0), train)[0])
        np.testing.assert_allclose(loss(batch), other(batch | {"image_embedding": z_t}), rtol=1e-6)
        assert not np.isclose(loss(batch), other(batch | {"image_embedding": -z_t}), rtol=1e-4)


def test_its_examples_are_drawn_from_embeddings_of_captions(monkeypatch):
    stage, frozen, params = of_text()
    batch, keys = random_batch(stage, 2), jax.random.split(jax.random.key(0), 2)
    seen, picture = [], jnp.ones((2, 8, 8, 3))
    monkeypatch.setattr(type(stage), "sample", lambda self, p, f, given, key: seen.append(given) or picture)
    stage.draw_examples(params, frozen, batch, keys)
    z_t = stage.clip.embed_texts(frozen, batch["clip_tokens"], batch["clip_tokens_length"])
    np.testing.assert_allclose(seen[0].image_embedding, z_t, rtol=1e-6)


@pytest.mark.parametrize("caption", [pytest.param("own", marks=pytest.mark.slow), "clip"])
def test_without_an_embedding_it_draws_as_where_training_dropped_it(caption, monkeypatch):
    """The embedding is dropped from the conditional rows too, and the caption is not."""
    stage, frozen, params = of_text(caption=caption, embedding="image")
    conditions = Conditions(**captions(random_batch(stage, 3)), guidance_scale=jnp.float32(2))
    seen, condition = [], type(stage).condition

    def spy(self, params, frozen, captions, has_caption, z, has_embedding):
        seen.append((has_caption, has_embedding))
        return condition(self, params, frozen, captions, has_caption, z, has_embedding)

    monkeypatch.setattr(type(stage), "condition", spy)
    drawn = stage.sample(params, frozen, conditions, jax.random.key(0))
    assert [part.tolist() for part in seen[0]] == [[True] * 3 + [False] * 3, [False] * 6]
    other = stage.sample(params, frozen, conditions._replace(image_embedding=jnp.ones((3, 8))), jax.random.key(0))
    assert seen[1][1].tolist() == [True] * 3 + [False] * 3
    assert drawn.shape == (3, 8, 8, 3) and not np.allclose(drawn, other, atol=1e-3)


def test_dropped_caption_of_its_own_is_not_read_at_all():
    """Nor is its first token: the caption may be any other."""
    stage, frozen, params = of_text(embedding="image")
    given = captions(random_batch(stage, 4))
    other = given | {"tokens": (given["tokens"] + 3) % 50}
    z, yes = jax.random.normal(jax.random.key(1), (4, 8)), jnp.ones(4, bool)
    x, t = jax.random.normal(jax.random.key(2), (4, 8, 8, 3)), jnp.full(4, 500)

    @jax.jit
    def predicted(captions, has_caption):
        conditioning = stage.condition(params, frozen, captions, has_caption, z, yes)
        return stage._network(params, conditioning)(x, t)

    np.testing.assert_array_equal(predicted(given, ~yes), predicted(other, ~yes))
    assert not np.array_equal(predicted(given, yes), predicted(other, yes))


def test_another_embedding_is_refused(tmp_path):
    config = small_config("decoder").unlock()
    config.model.embedding = "caption"
    with pytest.raises(UserError, match=r"model.embedding is 'caption': expected one of image, text"):
        check_config(config, str(tmp_path))
