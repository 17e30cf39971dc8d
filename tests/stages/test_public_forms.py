"""The forms that stages take for public weights: GLIDE's, and Karlo's of prior, decoder and upsampler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from shrink import random_batch, random_params, small_config, small_stage

from unclip_jax.bundle import check_params
from unclip_jax.stages import glide as glide_module
from unclip_jax.stages import make_stage
from unclip_jax.stages.base import empty_caption
from unclip_jax.stages.conditions import Conditions, captions

UNET = dict(channels=8, channel_mult=(1, 2), res_blocks=1, attention=(2,), middle_attention=True, head_channels=8)
UNET |= dict(heads=(0, 0), norm_groups=4, scale_shift=True, resample_blocks=True, dropout=0.0, remat=False)
SAMPLING = dict(sampler="ddpm", steps="3", eta=0.0, clip_x0=1.0, temperature=1.0)


def glide(factor=0, inpaint=False):
    """A GLIDE of a few channels that draws 8 px, and random parameters."""
    model = dict(image_size=8, factor=factor, interpolation="bilinear", round_low_res=True, inpaint=inpaint, unet=UNET)
    model |= dict(text=dict(vocab_size=300, context=10, width=8, depth=1, heads=2))
    diffusion = dict(schedule="cosine", timesteps=1000, predicts="eps", learned_variance=True, snr_clip=())
    config = dict(stage="glide", dtype="float32", model=model, diffusion=diffusion | dict(drop_caption=0.2))
    stage = make_stage(ConfigDict(config | dict(sampling=SAMPLING)).lock())
    return stage, random_params(stage)


def karlo(name):
    """The tiny prior or decoder in Karlo's form: (stage, CLIP's parameters, parameters)."""
    config = small_config(name).unlock()
    config.model.caption = "clip"
    if name == "prior_diffusion":
        config.diffusion.whiten = True
        config.model.context = 12
    clip, frozen, _ = small_stage("clip")[0], small_stage("decoder")[1], None
    stage = make_stage(config.lock(), clip)
    return stage, frozen, random_params(stage)


def unmoved(stage, params, frozen):
    """Names of parameters without a gradient."""
    batch = random_batch(stage, 8)
    grads = jax.jit(jax.grad(lambda p: stage.loss(p, frozen, batch, jax.random.key(3))[0]))(params)
    paths = jax.tree_util.tree_leaves_with_path(grads)
    return {jax.tree_util.keystr(p, simple=True, separator="/") for p, g in paths if not float(jnp.abs(g).max()) > 0}


@pytest.mark.slow
@pytest.mark.parametrize(("factor", "inpaint"), [(0, False), (4, True)])
def test_every_parameter_of_glide_learns(factor, inpaint):
    stage, params = glide(factor, inpaint)
    assert unmoved(stage, params, {}) == set()


def test_dropped_caption_reaches_glide_on_no_path():
    stage, params = glide()
    batch = random_batch(stage, 4)

    @jax.jit
    def output(tokens, length):
        x = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
        return stage.apply(params, stage.condition(params, tokens, length), [], x, jnp.full((4,), 500))

    tokens, length = batch["tokens"], batch["tokens_length"]
    np.testing.assert_array_equal(output(tokens, 0 * length), output(tokens + 1, 0 * length))
    assert not np.array_equal(output(tokens, length), output(tokens + 1, length))


def test_guidance_scale_one_is_plain_glide():
    stage, params = glide()
    conditions = Conditions(**captions(random_batch(stage, 3)))
    draw = jax.jit(stage.sample)
    plain = draw(params, {}, conditions, jax.random.key(0))
    guided = (conditions._replace(guidance_scale=jnp.float32(scale)) for scale in (1, 3000))
    one, many = (draw(params, {}, c, jax.random.key(0)) for c in guided)
    np.testing.assert_allclose(one, plain, atol=2e-5)
    assert not np.allclose(many, plain, atol=1e-2)


@pytest.mark.parametrize(("drop", "sampling", "given"), [(0.2, 3.0, 3.0), (0.0, 3.0, None), (0.2, None, None)])
def test_glide_s_examples_are_guided_if_captions_were_dropped_and_there_is_a_scale(drop, sampling, given, monkeypatch):
    stage, params = glide()
    config = stage.config.unlock()
    config.diffusion.drop_caption = drop
    if sampling is not None:
        config.sampling.guidance_scale = sampling
    seen, picture = [], jnp.zeros((2, 8, 8, 3))
    monkeypatch.setattr(type(stage), "sample", lambda self, p, f, conditions, key: seen.append(conditions) or picture)
    stage.draw_examples(params, {}, random_batch(stage, 2), jax.random.split(jax.random.key(0), 2))
    assert seen[0].guidance_scale == given and seen[0].tokens is not None


@pytest.mark.parametrize("factor", [0, 4])
def test_glide_keeps_known_pixels_and_draws_the_others(factor):
    stage, params = glide(factor, inpaint=True)
    rng = np.random.default_rng(0)
    conditions = Conditions(**captions(random_batch(stage, 2)))
    if factor:
        conditions = conditions._replace(low_res=rng.uniform(-1, 1, (2, 2, 2, 3)).astype(np.float32))
    known = rng.random((2, 8, 8, 1)) < 0.5
    image = rng.uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
    conditions = conditions._replace(known=known, known_image=image)
    drawn = np.asarray(jax.jit(stage.sample)(params, {}, conditions, jax.random.key(0)))
    known = np.broadcast_to(known, image.shape)
    np.testing.assert_allclose(drawn[known], image[known], atol=1e-6)
    assert np.abs(drawn - image)[~known].mean() > 0.1


def input_channels_moved(stage, params):
    """Which channels of the U-Net's input the loss reaches the weights of."""
    batch = random_batch(stage, 8)
    grads = jax.jit(jax.grad(lambda p: stage.loss(p, {}, batch, jax.random.key(3))[0]))(params)
    return np.abs(np.asarray(grads["unet"]["conv_in"]["kernel"])).max(axis=(0, 1, 3)) > 0


@pytest.mark.slow
def test_training_to_inpaint_gives_known_pixels_and_hides_the_others(monkeypatch):
    stage, params = glide(4, inpaint=True)
    assert input_channels_moved(stage, params).all()
    hide = lambda key, rows, size: np.zeros((rows, size, size, 1), bool)  # noqa: E731
    monkeypatch.setattr(glide_module, "random_known", hide)
    small_picture = [True] * 3
    assert input_channels_moved(stage, params).tolist() == [True] * 3 + [False] * 4 + small_picture


@pytest.mark.parametrize("factor", [0, pytest.param(4, marks=pytest.mark.slow)])
def test_model_adopted_for_inpainting_draws_as_before_whatever_is_known(factor):
    plain, params = glide(factor)
    inpainting, _ = glide(factor, inpaint=True)
    adopted = inpainting.adapt_params(params, plain.config)
    check_params(adopted, jax.eval_shape(inpainting.init, jax.random.key(0)))
    batch, rng = random_batch(plain, 3), np.random.default_rng(0)
    x_t, image = rng.normal(size=(2, 3, 8, 8, 3)).astype(np.float32)
    conditions = Conditions(low_res=rng.uniform(-1, 1, (3, 2, 2, 3)).astype(np.float32))
    known = conditions._replace(known=rng.random((3, 8, 8, 1)) < 0.5, known_image=image)

    def output(stage, params, conditions):
        conditioning = stage.condition(params, batch["tokens"], batch["tokens_length"])
        return stage.apply(params, conditioning, stage._extra_channels(conditions, x_t.shape), x_t, jnp.full((3,), 300))

    before = jax.jit(lambda: output(plain, params, conditions))()
    after = jax.jit(lambda: output(inpainting, adopted, known))()
    np.testing.assert_allclose(after, before, atol=1e-5)
    assert inpainting.adapt_params(adopted, inpainting.config) is adopted, "only once"
    assert plain.adapt_params(params, plain.config) is params


@pytest.mark.slow
def test_pictures_of_the_evaluation_show_what_was_known():
    stage, params = glide(4, inpaint=True)
    batch = random_batch(stage, 8)
    keys = jax.random.split(jax.random.key(0), 8)
    rows = jax.jit(lambda p: stage.draw_examples(p, {}, batch, keys))(params)
    drawn, given, truth = (np.asarray(rows[name]).astype(int) for name in ("drawn", "known", "true"))
    np.testing.assert_array_equal(truth, batch["image"])
    erased = (given == 128).all(axis=-1)
    assert 0.2 < erased.mean() < 0.9
    np.testing.assert_array_equal(given[~erased], truth[~erased])
    np.testing.assert_array_equal(drawn[~erased], truth[~erased])
    assert (drawn[erased] != truth[erased]).any(axis=-1).mean() > 0.9


@pytest.mark.slow
def test_evaluation_guides_only_a_model_that_knows_empty_captions():
    stage, params = glide()
    batch = random_batch(stage, 2)

    def drawn(drop_caption, guidance_scale):
        config = stage.config.copy_and_resolve_references().unlock()
        config.diffusion.drop_caption = drop_caption
        config.sampling.guidance_scale = guidance_scale
        other = make_stage(config.lock())
        keys = jax.random.split(jax.random.key(0), 2)
        return jax.jit(lambda p: other.draw_examples(p, {}, batch, keys)["drawn"])(params)

    np.testing.assert_array_equal(drawn(0.0, 3000.0), drawn(0.0, 1.0))
    assert not np.array_equal(drawn(0.2, 3000.0), drawn(0.2, 1.0))


def test_glide_hears_the_small_picture():
    stage, params = glide(4)
    conditions = Conditions(**captions(random_batch(stage, 2)))
    dark, light = (conditions._replace(low_res=np.full((2, 2, 2, 3), v, np.float32)) for v in (-1, 1))
    draw = jax.jit(stage.sample)
    assert not np.allclose(*(draw(params, {}, c, jax.random.key(0)) for c in (dark, light)), atol=1e-3)


@pytest.mark.parametrize("name", ["prior_diffusion", pytest.param("decoder", marks=pytest.mark.slow)])
def test_every_parameter_learns_where_clip_reads_the_caption(name):
    stage, frozen, params = karlo(name)
    fixed = {"embedding_mean", "embedding_std", "fixed/C"} if name == "prior_diffusion" else set()
    assert unmoved(stage, params, frozen) == fixed


def test_empty_caption_is_start_and_end():
    tokens, length = empty_caption(jnp.array([[2, 7, 8, 3, 0], [2, 9, 3, 0, 0]]), jnp.array([4, 3]))
    np.testing.assert_array_equal(tokens, [[2, 3, 0, 0, 0]] * 2)
    np.testing.assert_array_equal(length, [2, 2])


def test_dropped_caption_reaches_karlos_decoder_on_no_path():
    stage, frozen, params = karlo("decoder")
    batch = random_batch(stage, 4)
    tokens = batch["clip_tokens"].copy()
    length = batch["clip_tokens_length"]
    tokens[:, 0], tokens[np.arange(4), length - 1] = 2, 3
    other = tokens.copy()
    other[:, 1:-1] += (np.arange(1, 11) < length[:, None] - 1) * 5
    z, yes = jax.random.normal(jax.random.key(1), (4, 8)), jnp.ones(4, bool)

    @jax.jit
    def conditioning(tokens, has_caption):
        captions = {"clip_tokens": tokens, "clip_tokens_length": length}
        return stage.condition(params, frozen, captions, has_caption, z, yes)

    for a, b in zip(conditioning(tokens, ~yes), conditioning(other, ~yes), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.allclose(conditioning(tokens, yes).emb, conditioning(other, yes).emb)


def test_positions_behind_the_caption_are_masked_in_karlos_decoder():
    stage, _, params = karlo("decoder")
    context, width = stage.clip.config.model.text.context, stage.clip.config.model.text.width
    states = jax.random.normal(jax.random.key(0), (2, context, width))
    z_t, z_i, x = (jax.random.normal(jax.random.key(k), s) for k, s in ((1, (2, 8)), (2, (2, 8)), (3, (2, 8, 8, 3))))
    length, yes = jnp.array([4, 9]), jnp.ones(2, bool)

    @jax.jit
    def output(states):
        conditioning = stage.conditioner().apply({"params": params["conditioner"]}, states, length, z_t, z_i, yes)
        return stage._unet().apply({"params": params["unet"]}, x, jnp.full((2,), 500), *conditioning)

    gradient = jax.grad(lambda s: jnp.sum(output(s) ** 2))(states)
    reached = np.abs(np.asarray(gradient)).max(axis=-1) > 0
    np.testing.assert_array_equal(reached, np.arange(context) < np.asarray(length)[:, None])


def test_whitened_prior_draws_in_the_space_of_the_embeddings():
    stage, frozen, params = karlo("prior_diffusion")
    conditions = Conditions(**captions(random_batch(stage, 3)))
    conditions = conditions._replace(text_embedding=jnp.ones((3, 8)), guidance_scale=jnp.float32(1))
    with stage.clip.config.unlocked():
        raw = stage.clip.config.copy_and_resolve_references()
    raw.model.unit_norm = False
    raw = make_stage(stage.config, make_stage(raw.lock()))
    draw = jax.jit(raw.sample)
    mean, std = jnp.arange(8.0), jnp.full(8, 3.0)
    white = params | {"embedding_mean": 0 * mean, "embedding_std": std / std}
    white = draw(white, frozen, conditions, jax.random.key(0))
    drawn = draw(params | {"embedding_mean": mean, "embedding_std": std}, frozen, conditions, jax.random.key(0))
    np.testing.assert_allclose(drawn, white * 3 + mean[None], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_second_network_takes_the_last_step_alone():
    config = small_config("upsampler_256").unlock()
    config.model.last_step = True
    config.sampling.update(dict(steps="3", sampler="ddpm"))
    stage = make_stage(config.lock())
    plain, _, first = small_stage("upsampler_256")
    second = random_params(plain, 5)
    low = Conditions(low_res=np.random.default_rng(0).uniform(-1, 1, (1, 4, 4, 3)).astype(np.float32))
    draw = jax.jit(stage.sample)
    pairs = (first, first), (first, second), (second, first)
    one, both, swapped = (draw({"first": a, "last": b}, {}, low, jax.random.key(0)) for a, b in pairs)
    config = plain.config.copy_and_resolve_references().unlock()
    config.sampling.update(dict(steps="3", sampler="ddpm"))
    alone = jax.jit(make_stage(config.lock()).sample)(first, {}, low, jax.random.key(0))
    np.testing.assert_allclose(one, alone, atol=1e-5)
    assert not np.allclose(both, one, atol=1e-3) and not np.allclose(swapped, one, atol=1e-3)
    batch = random_batch(stage, 2)
    params = {"first": first, "last": second}
    grads = jax.jit(jax.grad(lambda p: stage.loss(p, {}, batch, jax.random.key(0))[0]))(params)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads["last"])) == 0
