"""What an upsampler may have besides the paper's: attention, captions, and small pictures that nothing degrades."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from shrink import random_batch, random_params, small_config

from unclip_jax.config_checks import check_config
from unclip_jax.errors import UserError
from unclip_jax.stages import make_stage
from unclip_jax.stages import upsampler as module
from unclip_jax.stages.conditions import Conditions, captions
from unclip_jax.training.leaves import named_leaves
from unclip_jax.training.sharding import make_mesh
from unclip_jax.training.state import init_state, make_train_step, root_key


def upsampler(**flat):
    """The first upsampler, shrunk, with these keys changed: (stage, parameters)."""
    config = small_config("upsampler_256").unlock()
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in flat.items()})
    stage = make_stage(config.lock())
    return stage, random_params(stage)


READING = {"model__caption": "own", "model__unet__attention": (2,), "model__unet__middle_attention": True}
READING |= {"diffusion__drop_caption": 0.5}


def test_the_papers_has_neither_attention_nor_captions():
    """Its parameters are those of a U-Net of residual blocks alone, under names of their own."""
    stage, params = upsampler()
    assert stage.texts == {} and not stage.guided and "conv_in" in params
    assert not [name for name in named_leaves(params) if "attention" in name or "conditioner" in name]


@pytest.mark.parametrize(
    ("changes", "added"),
    [
        pytest.param(
            {"model__unet__attention": (1, 2)},
            {"down_0_0", "down_1_0", "up_0_0", "up_0_1", "up_1_0", "up_1_1"},
            marks=pytest.mark.slow,
        ),
        ({"model__unet__middle_attention": True}, {"middle"}),
    ],
)
def test_attention_is_where_the_config_says(changes, added):
    stage, params = upsampler(**changes)
    attends = {name.split("/")[0].removesuffix("_attention") for name in named_leaves(params) if "_attention" in name}
    assert attends == added
    assert not any("context" in name for name in named_leaves(params))
    batch = random_batch(stage, 4)
    grads = jax.jit(jax.grad(lambda p: stage.loss(p, {}, batch, jax.random.key(0))[0]))(params)
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))


@pytest.mark.slow
def test_with_captions_it_trains_two_steps():
    stage, params = upsampler(**READING)
    config, mesh = stage.config, make_mesh(ConfigDict(dict(data=-1, fsdp=1)), jax.devices()[:1])
    step, state = make_train_step(stage, config, mesh), init_state(stage, config, mesh, 0)
    for seed in range(2):
        state, metrics = step(state, {}, random_batch(stage, 16, seed), root_key(0))
        assert np.isfinite(float(metrics["loss"])) and float(metrics["skipped"]) == 0
    assert jax.tree.structure(state.params) == jax.tree.structure(params)


@pytest.mark.slow
def test_every_parameter_that_reads_captions_learns():
    """All but the network of the last step, which training leaves alone."""
    stage, params = upsampler(**READING, model__last_step=True)
    batch = random_batch(stage, 8)
    grads = jax.jit(jax.grad(lambda p: stage.loss(p, {}, batch, jax.random.key(0))[0]))(params)
    still = {name for name, g in named_leaves(grads).items() if not float(jnp.abs(g).max()) > 0}
    assert still == {name for name in named_leaves(params) if name.startswith("unet/last/")}


@pytest.mark.parametrize("last_step", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_it_draws_by_captions_and_is_guided_by_them(last_step):
    stage, params = upsampler(**READING, model__last_step=last_step)
    batch, low = random_batch(stage, 2), np.random.default_rng(0).uniform(-1, 1, (2, 4, 6, 3)).astype(np.float32)
    conditions = Conditions(**captions(batch), low_res=low)
    draw = jax.jit(stage.sample)
    plain = draw(params, {}, conditions, jax.random.key(0))
    scales = (conditions._replace(guidance_scale=jnp.float32(scale)) for scale in (1, 3000))
    one, many = (draw(params, {}, given, jax.random.key(0)) for given in scales)
    assert plain.shape == (2, 16, 24, 3)
    np.testing.assert_allclose(one, plain, atol=2e-5)
    assert not np.allclose(many, plain, atol=1e-3)
    other = draw(params, {}, conditions._replace(tokens=batch["tokens"] + 1), jax.random.key(0))
    assert not np.array_equal(other, plain)


def test_captions_are_dropped_in_training_alone_at_their_rate(monkeypatch):
    stage, params = upsampler(**READING)
    seen, condition = [], type(stage).condition

    def spy(self, params, tokens, length):
        seen.append(length)
        return condition(self, params, tokens, length)

    monkeypatch.setattr(type(stage), "condition", spy)
    batch = random_batch(stage, 16)

    @jax.jit
    def dropped(key):
        stage.loss(params, {}, batch, key)
        stage.loss(params, {}, batch, key, train=False)
        return jnp.stack([length == 0 for length in map(jnp.asarray, seen[-2:])])

    training, held_out = np.concatenate([dropped(jax.random.key(k)) for k in range(40)], axis=1)
    assert abs(training.mean() - 0.5) < 4 * (0.25 / training.size) ** 0.5 and not held_out.any()


@pytest.mark.parametrize(("drop", "guided"), [(0.0, False), (0.2, True)])
def test_it_is_guided_only_where_captions_were_dropped(drop, guided, monkeypatch):
    stage, params = upsampler(**READING | {"diffusion__drop_caption": drop, "sampling__guidance_scale": 3.0})
    seen, picture = [], jnp.zeros((2, 16, 16, 3))
    monkeypatch.setattr(type(stage), "sample", lambda self, p, f, given, key: seen.append(given) or picture)
    stage.draw_examples(params, {}, random_batch(stage, 2), jax.random.split(jax.random.key(0), 2))
    assert stage.guided == guided and seen[0].tokens is not None
    assert stage.texts == {"tokens": ("own", 10, False)}  # neither start nor end tokens
    assert seen[0].guidance_scale == (3.0 if guided else None)


@pytest.mark.parametrize(("degradation", "blurs"), [("none", False), ("blur", True)])
def test_nothing_degrades_small_pictures_unless_asked(degradation, blurs, monkeypatch):
    stage, params = upsampler(diffusion__degradation=degradation)
    blurred = []
    monkeypatch.setattr(module, "maybe_blur", lambda key, images, *_: blurred.append(1) or images)
    loss = jax.eval_shape(stage.loss, params, {}, random_batch(stage, 4), jax.random.key(0))[0]
    assert loss.shape == () and bool(blurred) == blurs and stage.bsr_factor is None


@pytest.mark.parametrize(
    ("flat", "says"),
    [
        ({"model.caption": "clip"}, "model.caption is 'clip': an upsampler has none or own"),
        ({"diffusion.drop_caption": 0.2}, "this upsampler reads none"),
        ({"diffusion.degradation": "noise"}, "expected one of none, blur, bsr"),
    ],
)
def test_what_an_upsampler_cannot_have_is_refused(flat, says, tmp_path):
    config = small_config("upsampler_256").unlock()
    config.update_from_flattened_dict(flat)
    with pytest.raises(UserError, match=says):
        check_config(config, str(tmp_path))
