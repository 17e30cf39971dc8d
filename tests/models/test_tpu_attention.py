"""The TPU's attention kernel, run by Pallas's interpreter, against the plain form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from unclip_jax.models import layers
from unclip_jax.models import tpu_attention as kernel
from unclip_jax.models.layers import Mask
from unclip_jax.models.mesh import jit_on_mesh
from unclip_jax.models.tpu_attention import supported, tpu_attention
from unclip_jax.models.transformer import Transformer


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))


def arrays(batch, length, keys, heads, width):
    random = jax.random.split(jax.random.key(0), 4)
    shapes = [(batch, n, heads, width) for n in (length, keys, keys, length)]
    return [jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(random, shapes, strict=True)]


def close(ours, theirs, tolerance=0.02):
    ours, theirs = (np.asarray(x, np.float32) for x in (ours, theirs))
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


def plain(query, key, value, mask):
    with jax.numpy_dtype_promotion("standard"):
        exact = (x.astype(jnp.float32) for x in (query, key, value))
        return jax.nn.dot_product_attention(*exact, mask=mask)


# Queries, keys, heads, channels of a head: several tiles of queries; several groups of lanes; one head in all lanes.
TILES, GROUPS, ALONE = (256, 1284, 2, 64), (24, 40, 12, 64), (16, 33, 2, 128)
CASES = [("none", TILES), ("rows", TILES), ("causal", GROUPS), ("keys", GROUPS), ("none", ALONE), ("rows", ALONE)]


@pytest.mark.parametrize("kind, shape", CASES)
def test_output_and_gradients_are_those_of_the_plain_form(kind, shape):
    length, keys, *_ = shape
    query, key, value, gradient = arrays(2, *shape)
    seen = jax.random.bernoulli(jax.random.key(1), 0.7, (2, 1, length, keys)).at[..., 0].set(True)
    masks = {"none": None, "causal": seen[:1], "keys": seen[:, :, :1], "rows": seen}
    assert supported(query, key)
    ours, back = jax.vjp(lambda *x: tpu_attention(*x, masks[kind]), query, key, value)
    grads = back(gradient)
    theirs, back = jax.vjp(lambda *x: plain(*x, masks[kind]), query, key, value)
    close(ours, theirs)
    for a, b in zip(grads, back(gradient.astype(jnp.float32)), strict=True):
        close(a, b)


def test_rows_that_see_nothing_give_finite_numbers():
    query, key, value, _ = arrays(1, 16, 16, 2, 64)
    out = tpu_attention(query, key, value, jnp.zeros((1, 1, 16, 16), bool))
    close(out, jnp.broadcast_to(jnp.mean(value.astype(jnp.float32), axis=1, keepdims=True), out.shape))


@pytest.mark.parametrize(
    "change", [dict(dtype=jnp.float32), dict(width=48), dict(length=8), dict(heads=3)], ids=lambda c: str(*c)
)
def test_what_the_kernel_does_not_take(change):
    given = dict(length=32, heads=2, width=64, dtype=jnp.bfloat16) | change
    x = jax.ShapeDtypeStruct((2, given["length"], given["heads"], given["width"]), given["dtype"])
    assert not supported(x, x)


def test_a_transformer_on_several_devices_trains_alike_with_the_kernel(monkeypatch):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    network = Transformer(depth=2, heads=2, activation="gelu", dtype=jnp.bfloat16, remat=True)
    x = jax.random.normal(jax.random.key(0), (8, 24, 128))
    mask = Mask(causal=True, keys=jnp.arange(24)[None, :] < jnp.arange(17, 25)[:, None])
    params = network.init(jax.random.key(1), x)
    x, mask = jax.device_put((x, mask), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))

    def gradients():
        def loss(params, x, mask):
            return jnp.mean(jnp.square(network.apply(params, x, mask)))

        with jax.numpy_dtype_promotion("standard"):  # gradients of the plain form mix types
            return jit_on_mesh(jax.value_and_grad(loss), mesh)(params, x, mask)

    plainly = gradients()
    kernels = []
    monkeypatch.setattr(layers, "platform", lambda: "tpu")
    monkeypatch.setattr(kernel, "tpu_attention", lambda *x: kernels.append(x) or tpu_attention(*x))
    fused = gradients()
    assert kernels
    jax.tree.map(lambda a, b: close(b, a, 0.03), plainly, fused)
