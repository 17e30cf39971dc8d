"""The gradient of a contrastive loss from microbatches: that of the whole batch (GradCache, arXiv 2101.06983)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shrink import random_batch, random_params, small_config, small_stage

from unclip_jax import train
from unclip_jax.errors import UserError
from unclip_jax.stages import make_stage
from unclip_jax.training.gradients import gradients
from unclip_jax.training.leaves import named_leaves
from unclip_jax.training.sharding import batch_sharding, make_mesh, replicated

ROWS, KEY = 16, jax.random.key(5)


def found(stage, params, batch, microbatches, data=2):
    """Loss, metrics and gradient on two devices."""
    mesh = make_mesh(small_config("clip").mesh, jax.devices()[:data])
    params, batch = jax.device_put(params, replicated(mesh)), jax.device_put(batch, batch_sharding(mesh))
    return jax.device_get(jax.jit(lambda w, b: gradients(stage, w, w, {}, b, KEY, microbatches, mesh))(params, batch))


def compare(one, other):
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    for name, value in other[1].items():
        assert float(one[1][name]) == pytest.approx(float(value), rel=1e-5), name
    one, other = named_leaves(one[2]), named_leaves(other[2])
    largest = max(np.abs(g).max() for g in other.values())
    for name, grad in other.items():
        np.testing.assert_allclose(one[name], grad, rtol=1e-4, atol=2e-6 * largest, err_msg=name)


class Pairs:
    """Two linear towers, noise on each row, and the loss of their embeddings' products."""

    def embed_pairs(self, params, frozen, batch, key):
        x = jnp.tanh((batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape)) @ params["x"])
        return x, jnp.tanh(batch["y"] @ params["y"]), jnp.broadcast_to(jnp.exp(params["scale"]), (len(x), 1))

    def contrast(self, x, y, scale):
        logits = scale * x @ y.T
        losses = [jnp.mean(jax.nn.logsumexp(logits, axis=a) - jnp.diagonal(logits)) for a in (0, 1)]
        return sum(losses), {"scale": jnp.mean(scale)}


@pytest.mark.parametrize("data", [1, 2])
def test_microbatches_have_the_gradient_of_the_whole_batch(data):
    """Each microbatch has noise of its own, the same in both passes."""
    rng = np.random.default_rng(0)
    batch = {name: rng.normal(size=(ROWS, 6)).astype("f") for name in "xy"}
    params = {name: jnp.asarray(rng.normal(size=(6, 4)), jnp.float32) for name in "xy"} | {"scale": jnp.float32(0.5)}

    def whole_loss(params):
        parts = [jax.tree.map(lambda rows, m=m: rows[m::4], batch) for m in range(4)]
        pairs = [Pairs().embed_pairs(params, {}, part, jax.random.fold_in(KEY, m)) for m, part in enumerate(parts)]
        return Pairs().contrast(*(jnp.concatenate(rows) for rows in zip(*pairs, strict=True)))

    (loss, metrics), grads = jax.device_get(jax.jit(jax.value_and_grad(whole_loss, has_aux=True))(params))
    compare(found(Pairs(), params, batch, 4, data), (loss, metrics, grads))


@pytest.mark.slow
def test_clips_microbatches_have_the_gradient_of_the_whole_batch():
    stage, _, params = small_stage("clip")
    batch = random_batch(stage, ROWS)
    whole = found(stage, params, batch, 1)
    compare(found(stage, params, batch, 4), whole)
    # A mean of the microbatches' own losses is another: 4 pairs are easier to tell apart than 16.
    parts = [jax.tree.map(lambda rows, m=m: rows[m::4], batch) for m in range(4)]
    mean = np.mean([float(jax.jit(stage.loss)(params, {}, part, KEY)[0]) for part in parts])
    assert abs(mean - whole[0]) > 0.5


@pytest.mark.slow
def test_a_noised_clip_sees_the_same_noise_in_both_passes():
    stage, _, params = small_stage("clip_noised")
    batch = random_batch(stage, ROWS)

    def whole_loss(params):
        """All at once, each microbatch with its own key."""
        parts = [jax.tree.map(lambda rows, m=m: rows[m::4], batch) for m in range(4)]
        pairs = [stage.embed_pairs(params, {}, part, jax.random.fold_in(KEY, m)) for m, part in enumerate(parts)]
        return stage.contrast(*(jnp.concatenate(rows) for rows in zip(*pairs, strict=True)))

    (loss, metrics), grads = jax.device_get(jax.jit(jax.value_and_grad(whole_loss, has_aux=True))(params))
    compare(found(stage, params, batch, 4), (loss, metrics, grads))


@functools.cache
def sharp():
    """A CLIP whose rows climb in fours."""
    config = small_config("clip").unlock()
    config.optim.update(dict(sam_rho=0.1, sam_rows=4))
    return make_stage(config.lock())


@pytest.mark.slow
def test_rows_climb_together_within_a_microbatch():
    """The batch is laid so that the rows of a microbatch, dealt out in turn, are those that climb together in one."""
    stage = sharp()
    params, batch = random_params(stage), random_batch(stage, ROWS)
    dealt = np.arange(ROWS).reshape(4, 4).T.ravel()  # microbatch m takes m, m + 4, ...
    turned = jax.tree.map(lambda rows: rows[dealt], batch)
    compare(found(stage, params, turned, 4, data=1), found(stage, params, batch, 1, data=1))


def test_sam_needs_whole_groups_in_a_microbatch(tmp_path):
    config = small_config("clip").unlock()
    config.optim.update(dict(sam_rho=0.1, sam_rows=8, accumulate=4))
    with pytest.raises(UserError, match=r"rows that divide train\.batch_size=16 / optim.accumulate=4"):
        train.check_config(config.lock(), str(tmp_path))
