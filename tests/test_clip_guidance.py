"""A noised CLIP beside the decoder: what it must be, and that each row follows its own caption, at any scale."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shrink import random_params, save_cascade, small_config, small_stage, tokenizer_bytes

from unclip_jax import sample
from unclip_jax.bundle import save_bundle
from unclip_jax.cascade import Cascade
from unclip_jax.diffusion.schedule import make_schedule, table_at
from unclip_jax.errors import UserError
from unclip_jax.model import Model
from unclip_jax.stages import make_stage
from unclip_jax.stages.base import draw
from unclip_jax.stages.conditions import Conditions

TEXTS = ["a red apple", "one blue whale"]


def save_noised_clip(folder, **model):
    config = small_config("clip_noised").unlock()
    config.model.update(model)
    stage = make_stage(config.lock())
    save_bundle(folder, "clip", config, random_params(stage), tokenizer_bytes(), "", {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save_cascade(tmp_path_factory.mktemp("cascade"))
    save_noised_clip(folder / "noised_clip")
    return folder


def test_scale_is_free_and_zero_is_none(folder):
    whole = Cascade.load(str(folder))
    cascade = Cascade(whole.clip, whole.prior, whole.decoder, [], whole.noised_clip)
    z = np.eye(8, dtype=np.float32)[:2]
    plain, *guided = (
        cascade.generate(TEXTS, 0, 1.0, clip_guidance_scale=scale, embeddings=z)["images"][0].astype(int)
        for scale in (0.0, 1e-6, 1e4)
    )
    np.testing.assert_allclose(guided[0], plain, atol=1)
    assert np.abs(guided[1] - plain).max() > 1
    assert cascade.decoder._sample.jitted()._cache_size() == 2  # with a noised CLIP and without, whatever the scale
    other = cascade.generate([TEXTS[0], "a green fox"], 0, 1.0, clip_guidance_scale=1e4, embeddings=z)["images"][0]
    np.testing.assert_allclose(other[0], guided[1][0], atol=1)


def test_each_row_follows_the_gradient_of_its_own_caption():
    """A stage that draws the gradient itself; more rows than go through at once."""
    clip, _, params = small_stage("clip_noised")
    x = np.random.default_rng(0).normal(size=(20, 8, 8, 3)).astype(np.float32)
    t = np.full(20, 100, np.int32)
    text = np.random.default_rng(1).normal(size=(20, 8)).astype(np.float32)
    stage = SimpleNamespace(
        description="",
        tpu_options=None,
        config=SimpleNamespace(dtype="float32"),
        sample=lambda params, frozen, c, key: c.clip_scale * c.clip_gradient(c.x_T, c.tokens_length),
    )
    model, noised = (Model(s, p, None, "") for s, p in ((stage, {}), (clip, params)))
    conditions = Conditions(x_T=x, tokens_length=t, clip_scale=np.float32(2))  # t where any row's number has a place
    drawn = model.draw({}, conditions, jax.random.key(0), noised, text)
    expected = jax.jit(clip.similarity_gradient)(params, x, t, text)
    np.testing.assert_allclose(drawn, 2 * expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_guided_samples_move_where_the_gradient_points(sampler):
    """Data N(0, 1), seen through y = x_0 + N(0, 1): the gradient of log p(y | x_t) is known, and turns samples of the
    prior into samples of the posterior, whose mean is y / 2 and variance 1 / 2."""
    config = small_config("decoder").unlock()
    config.diffusion.update(dict(predicts="x0", learned_variance=False))
    config.sampling.update(dict(sampler=sampler, steps="250", clip_x0=0.0, eta=1.0))
    schedule, y = make_schedule("cosine", 1000), 1.6

    def network(x_t, t):
        return jnp.sqrt(table_at(schedule.alpha_bars, t, x_t)) * x_t  # E[x_0 | x_t]; its variance is beta-bar

    def gradient(x_t, t):
        signal, spread = (table_at(table, t, x_t) for table in (schedule.alpha_bars, schedule.beta_bars))
        return jnp.sqrt(signal) * (y - jnp.sqrt(signal) * x_t) / (1 + spread)

    def samples(conditions):
        drawn = jax.jit(lambda key: draw(config, network, (40, 8, 8, 3), conditions, key))(jax.random.key(0))
        return float(jnp.mean(drawn)), float(jnp.var(drawn))

    guided = Conditions(clip_gradient=gradient, clip_scale=jnp.float32(1))
    # The posterior's variance leaves chains of 250 steps 5 % too narrow.
    assert samples(Conditions()) == (pytest.approx(0, abs=0.03), pytest.approx(1, rel=0.08))
    assert samples(guided) == (pytest.approx(y / 2, rel=0.04), pytest.approx(1 / 2, rel=0.08))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
@pytest.mark.parametrize("scale", [None, 3.0])
def test_a_clip_that_saw_no_noise_guides_through_the_predicted_x0(sampler, scale):
    """Its gradient at x0 is G(x0) = y - x0. Where the network's prediction is x0 = a_t x_t, that by x_t is
    a_t G(a_t x_t); guidance of scale s predicts s a_t x_t against nothing."""
    config = small_config("decoder").unlock()
    config.diffusion.update(dict(predicts="x0", learned_variance=False))
    config.sampling.update(dict(sampler=sampler, steps="10", clip_x0=0.0, eta=1.0))
    schedule, y = make_schedule("cosine", 1000), 1.6

    def network(x_t, t):
        slope = 0.7 * jnp.sqrt(table_at(schedule.alpha_bars, t, x_t))
        conditional = (jnp.arange(len(x_t)) < 2).reshape(-1, 1, 1, 1)
        return jnp.where(conditional, slope * x_t, 0.0)

    def known(x_t, t):
        slope = (scale or 1) * 0.7 * jnp.sqrt(table_at(schedule.alpha_bars, t, x_t))
        return slope * (y - slope * x_t)

    given = Conditions(clip_scale=jnp.float32(0.8))
    given = given if scale is None else given._replace(guidance_scale=jnp.float32(scale))
    ways = (given._replace(clip_gradient=known), given._replace(x0_gradient=lambda x0, t: y - x0), given)
    expected, drawn, plain = (draw(config, network, (2, 4, 4, 3), way, jax.random.key(0)) for way in ways)
    np.testing.assert_allclose(drawn, expected, rtol=1e-4, atol=1e-5)
    assert not np.allclose(drawn, plain, atol=1e-2)


@pytest.mark.slow
def test_a_clip_that_saw_no_noise_guides_a_cascade(folder, tmp_path):
    """It may see larger pictures than the decoder draws."""
    for name in ("clip", "prior", "decoder"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "noised_clip").symlink_to(folder / "clip")
    whole = Cascade.load(str(tmp_path))
    cascade = Cascade(whole.clip, whole.prior, whole.decoder, [], whole.noised_clip)
    assert whole.noised_clip.stage.config.model.image_size == 16
    z = np.eye(8, dtype=np.float32)[:2]
    plain, *guided = (
        cascade.generate(TEXTS, 0, 1.0, clip_guidance_scale=scale, embeddings=z)["images"][0].astype(int)
        for scale in (0.0, 1e-6, 3000.0)
    )
    np.testing.assert_allclose(guided[0], plain, atol=1)
    assert np.abs(guided[1] - plain).max() > 1


def test_gradient_of_a_resized_picture_is_that_of_the_similarity():
    """By central differences, at 8 px of a CLIP that sees 16."""
    clip, _, params = small_stage("clip")
    text = np.random.default_rng(1).normal(size=(1, 8)).astype(np.float32)
    x, step = np.random.default_rng(0).normal(size=(2, 1, 8, 8, 3)).astype(np.float32)

    @jax.jit
    def similarity(x):
        pictures = clip._normalized(jax.image.resize(x, (1, 16, 16, 3), "cubic"))
        z = clip._model().apply({"params": params}, pictures, method="embed_image")
        return jnp.exp(params["logit_scale"]) * jnp.sum(z * text)

    found = jax.jit(Model(clip, params, None, "")._similarity_gradient)(params, text, x, np.zeros(1, np.int32))
    slope = (similarity(x + 1e-2 * step) - similarity(x - 1e-2 * step)) / 2e-2
    np.testing.assert_allclose(np.sum(found * step), slope, rtol=2e-2)


def test_noised_clip_of_another_decoder_is_refused(folder, tmp_path):
    for name in ("clip", "prior", "decoder"):
        (tmp_path / name).symlink_to(folder / name)
    save_noised_clip(tmp_path / "noised_clip", image_size=16)
    with pytest.raises(UserError, match="sees 16 px at 1000 timesteps, the decoder draws 8 px"):
        Cascade.load(str(tmp_path))


def test_clip_guidance_without_a_noised_clip_is_refused(tmp_path):
    folder = save_cascade(tmp_path / "cascade")
    with pytest.raises(UserError, match="needs a noised CLIP"):
        sample.main(["sample", f"--bundle={folder}", "--prompt=a fox", "--clip-guidance=2", f"--out={tmp_path}/out"])
