"""Networks: the papers' sizes to the last parameter, causality, and the published vectors."""

import itertools
import math
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from unclip_jax import cli, plan
from unclip_jax.models import layers, mesh
from unclip_jax.models.clip import TextTower
from unclip_jax.models.layers import GroupNorm, Mask, Projections, attention, dropout, timestep_embedding
from unclip_jax.models.transformer import TextTransformer, Transformer, activated
from unclip_jax.models.unet import UNet, downsample, upsample

F32 = jnp.float32


@pytest.mark.parametrize(
    ("config", "count"),
    [
        ("clip", 986_339_841),
        ("prior_diffusion", 1_326_752_768),
        ("decoder", 3_565_434_374),
        ("upsampler_256", 729_710_726),
        ("upsampler_1024", 282_064_326),
    ],
)
def test_papers_models_have_the_papers_size(config, count):
    assert sum(plan.parameters(cli.load_config(f"configs/{config}.py:paper")).values()) == count


def size(module, *inputs):
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    ("channels", "res_blocks", "mult", "attend", "context", "width", "depth", "heads", "vocab", "total"),
    [
        (64, 1, (1, 2), (2,), 16, 64, 2, 2, 100, 3_486_854),
        (32, 2, (1, 2, 3, 4), (2, 4, 8), 32, 96, 3, 3, 512, 7_087_366),
    ],
)
def test_small_glide_has_the_size_of_the_public_code(
    channels, res_blocks, mult, attend, context, width, depth, heads, vocab, total
):
    unet = UNet(channels, mult, res_blocks, attend, True, 32, (0, 0), 32, True, True, 6, 0.1, F32, False)
    text = TextTransformer(vocab, context, width, depth, heads, F32, False)
    t = jnp.zeros((1,), jnp.int32)
    count = size(unet, jnp.zeros((1, 64, 64, 3)), t, None, jnp.zeros((1, context, width)))
    count += size(text, jnp.zeros((1, context), jnp.int32), t) + 4 * channels * (width + 1)  # and xf_proj
    assert count == total


def test_timestep_embedding_is_glides():
    expected = [-0.883849, 0.964965, 0.283662, 0.877583, -0.467772, -0.262379, -0.958924, 0.479426]
    np.testing.assert_allclose(timestep_embedding(jnp.array([500]), 8)[0], expected, atol=1e-5)


def test_timestep_embedding_tells_neighbours_apart_at_any_precision():
    pair = timestep_embedding(jnp.array([998, 999]), 64)
    assert pair.dtype == F32
    assert float(jnp.abs(pair[0] - pair[1]).max()) > 0.1


def test_causal_transformer_sees_no_future():
    model = Transformer(2, 2, "gelu", F32, False)
    x = jax.random.normal(jax.random.key(0), (1, 6, 16))
    params = model.init(jax.random.key(1), x, Mask(causal=True))
    jacobian = jax.jacobian(lambda x: jnp.sum(model.apply(params, x, Mask(causal=True)), axis=-1))(x)
    reach = np.abs(np.asarray(jacobian)).sum(axis=(0, 2, 4))  # (output position, input position)
    assert (reach[np.triu_indices(6, 1)] == 0).all()
    assert (reach[np.tril_indices(6)] > 0).all()


def test_text_tower_reads_the_last_token_and_nothing_behind_it():
    tower = TextTower(4, 50, 8, 16, 1, 2, "quick_gelu", F32, False)
    tokens = jnp.arange(8, dtype=jnp.int32)[None]
    length = jnp.array([5], jnp.int32)
    params = tower.init(jax.random.key(0), tokens, length)
    out, states = tower.apply(params, tokens, length)
    changed, changed_states = tower.apply(params, tokens.at[0, 5:].set(49), length)
    np.testing.assert_array_equal(out, changed)
    np.testing.assert_array_equal(states[:, :5], changed_states[:, :5])
    assert not np.allclose(out, tower.apply(params, tokens.at[0, 4].set(49), length)[0])


@pytest.mark.slow
def test_remat_changes_nothing():
    x, t = jax.random.normal(jax.random.key(0), (2, 8, 8, 3)), jnp.array([3, 700])
    plain = UNet(8, (1, 2), 1, (2,), True, 8, (0, 0), 4, True, True, 3, 0.0, F32, False)
    params = jax.tree.map(lambda p: p + 0.05, jax.jit(plain.init)(jax.random.key(1), x, t))
    loss = lambda model: jax.jit(jax.value_and_grad(lambda p: jnp.sum(model.apply(p, x, t) ** 2)))(params)  # noqa: E731
    value, grads = loss(plain)
    other_value, other_grads = loss(plain.clone(remat=True))
    np.testing.assert_allclose(value, other_value, rtol=1e-6)
    chex.assert_trees_all_close(grads, other_grads, rtol=1e-4, atol=1e-4)


def test_remat_keeps_the_norms_sums():
    network = Transformer(depth=6, heads=2, activation="gelu", dtype=jnp.float32, remat=True)
    x = jnp.ones((2, 5, 8))
    params = network.init(jax.random.key(0), x)
    program = jax.make_jaxpr(jax.grad(lambda p: jnp.sum(network.apply(p, x))))(params)
    assert str(program).count("f32[6,2,5]") == 4  # from the forward loop to the backward one: two norms of each block


class TestActivations(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.named_parameters(
        ("gelu", "gelu", lambda x: jax.nn.gelu(x, approximate=False)),
        ("quick_gelu", "quick_gelu", lambda x: x * jax.nn.sigmoid(1.702 * x)),
    )
    def test_slopes_are_those_of_jaxs_own(self, name, own):
        x = jnp.linspace(-8, 8, 161)
        slopes = self.variant(jax.grad(lambda x: jnp.sum(activated(name, x))))(x)
        np.testing.assert_allclose(slopes, jax.vmap(jax.grad(own))(x), atol=1e-6)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_gradients_of_projections_biases_are_summed_in_float32(platform, monkeypatch):
    monkeypatch.setattr(layers, "platform", lambda: platform)
    network, x = Projections(3, 2, jnp.bfloat16), jnp.ones((7, 143, 4))
    params = network.init(jax.random.key(0), x)

    def loss(params):
        return sum(jnp.sum(part.astype(jnp.float32)) for part in network.apply(params, x))

    # bfloat16 has 8 binary digits: 1001 ones are 1000 there.
    np.testing.assert_array_equal(jax.grad(loss)(params)["params"]["bias"], np.full(6, 1001.0))


def test_unet_computes_in_bfloat16_and_answers_in_float32():
    model = UNet(8, (1, 2), 1, (2,), True, 8, (0, 0), 4, True, True, 6, 0.0, jnp.bfloat16, False)
    x, t = jnp.ones((1, 8, 8, 3)), jnp.array([1])
    params = jax.jit(model.init)(jax.random.key(0), x, t, None, jnp.ones((1, 3, 5)))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    assert jax.eval_shape(model.apply, params, x, t, None, jnp.ones((1, 3, 5))).dtype == F32


# Which of 7 keys 5 queries attend to, in rows of a batch of 2; the queries stand at the last 5 of the 7.
BEHIND = np.arange(7)[None] <= np.arange(5)[:, None] + 2
KEYS = np.array([[1, 0, 1, 1, 0, 1, 0], [1, 1, 1, 0, 1, 1, 1]], bool)
MASKS = {
    "all": (None, np.ones((5, 7), bool)),
    "causal": (Mask(causal=True), BEHIND),
    "keys": (Mask(keys=jnp.asarray(KEYS)), KEYS[:, None, None]),
    "both": (Mask(causal=True, keys=jnp.asarray(KEYS)), KEYS[:, None, None] & BEHIND),
}


@pytest.mark.parametrize(("mask", "seen"), MASKS.values(), ids=MASKS)
def test_attention_is_softmax_of_scaled_products(mask, seen):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, places, 3, 4)).astype(np.float32) for places in (5, 7, 7))
    seen = np.broadcast_to(seen, (2, 1, 5, 7))
    logits = np.einsum("bthd,bshd->bhts", q, k) / 2
    weights = np.exp(np.where(seen, logits, -np.inf))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bhts,bshd->bthd", weights, v)
    ours, back = jax.vjp(lambda *x: attention(*x, mask), *map(jnp.asarray, (q, k, v)))
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    theirs = jax.vjp(lambda *x: jax.nn.dot_product_attention(*x, mask=jnp.asarray(seen)), *map(jnp.asarray, (q, k, v)))
    chex.assert_trees_all_close(back(jnp.sin(ours)), theirs[1](jnp.sin(ours)), atol=1e-5)


def test_resampling_is_mean_and_nearest():
    x = jnp.arange(16, dtype=F32).reshape(1, 4, 4, 1)
    np.testing.assert_allclose(downsample(x)[0, :, :, 0], [[2.5, 4.5], [10.5, 12.5]])
    np.testing.assert_array_equal(upsample(x)[0, :, :, 0], np.kron(np.asarray(x[0, :, :, 0]), np.ones((2, 2))))


def test_dropout_keeps_nine_tenths_and_scales_them():
    x = jnp.ones((8, 32, 32, 64), jnp.bfloat16)
    dropped = [np.asarray(dropout(x, 0.1, jax.random.key(seed))) for seed in (0, 1)]
    assert set(np.unique(dropped[0]).astype(np.float32)) == {0.0, np.float32(jnp.bfloat16(1 / 0.9))}
    zero, other = (0.1 - (d == 0) for d in dropped)
    size = 4 / zero.size**0.5  # four standard deviations of a mean of noise as wide as one
    assert abs(zero.mean()) < 0.3 * size
    assert abs((zero * other).mean()) < 0.09 * size
    split = jax.device_put(x, jax.NamedSharding(jax.make_mesh((8,), ("data",)), jax.P("data")))
    np.testing.assert_array_equal(jax.jit(lambda x: dropout(x, 0.1, jax.random.key(0)))(split), dropped[0])
    # Nor do an element's neighbours tell whether it is zero, near or far.
    for axis, distance in itertools.product(range(4), (1, 2, 4)):
        assert abs((zero * np.roll(zero, distance, axis)).mean()) < 0.09 * size


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_group_norm_is_the_two_pass_form(offset):
    x = (np.random.default_rng(0).normal(size=(2, 5, 4, 12)) + offset).astype(np.float32)
    scale, bias = np.linspace(0.5, 2, 12, dtype=np.float32), np.linspace(-1, 1, 12, dtype=np.float32)
    grouped = x.astype(np.float64).reshape(2, 20, 3, 4)
    mean, variance = grouped.mean((1, 3), keepdims=True), grouped.var((1, 3), keepdims=True)
    expected = ((grouped - mean) / np.sqrt(variance + 1e-5)).reshape(x.shape) * scale + bias
    out = GroupNorm(3).apply({"params": {"scale": scale, "bias": bias}}, x)
    np.testing.assert_allclose(out, expected, atol=1e-5 if offset == 0 else 2e-3)


def stand_in_for_cudnn(asked):
    """In place of JAX's function: refuses what it refuses in training, notes the rest, and computes it by XLA."""
    by_xla = jax.nn.dot_product_attention

    def attention(query, key, value, implementation, **options):
        assert implementation == "cudnn" and query.dtype == jnp.bfloat16
        assert query.shape[1] % 2 == key.shape[1] % 2 == 0, "an odd length"
        assert not options.get("is_causal") or query.shape[1] == key.shape[1], "causality from the first key on"
        if "mask" in options:
            assert options["mask"].shape == (query.shape[0], 1, query.shape[1], key.shape[1])
        asked.append(set(options))
        return by_xla(*(x.astype(F32) for x in (query, key, value)), **options).astype(query.dtype)

    return attention


@pytest.mark.parametrize(
    ("length", "keys", "mask", "options"),
    [
        (8, 8, Mask(), set()),
        (5, 5, Mask(), {"key_value_seq_lengths"}),
        (5, 8, Mask(), set()),
        (8, 8, Mask(causal=True), {"is_causal"}),
        (5, 5, Mask(causal=True), {"is_causal"}),
        (5, 7, Mask(causal=True), {"mask"}),  # a memory in front
        (4, 7, Mask(keys=jnp.asarray(KEYS)), {"mask"}),
        (5, 7, Mask(causal=True, keys=jnp.asarray(KEYS)), {"mask"}),
        (1, 7, Mask(keys=jnp.asarray(KEYS)), None),  # a code by itself: no work for a kernel
    ],
)
def test_cudnn_gives_the_plain_forms_values_and_gradients(length, keys, mask, options, monkeypatch):
    draws = zip(jax.random.split(jax.random.key(0), 4), (length, keys, keys, length), strict=True)
    *inputs, back = (jax.random.normal(key, (2, places, 3, 8), jnp.bfloat16) for key, places in draws)
    expected, plain = jax.vjp(lambda *x: attention(*x, mask), *inputs)
    asked = []
    monkeypatch.setattr(layers, "compute_capability", lambda: 9.0)
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in_for_cudnn(asked))
    ours, by_cudnn = jax.vjp(lambda *x: attention(*x, mask), *inputs)
    assert asked == ([] if options is None else [options])
    chex.assert_trees_all_close((ours, *by_cudnn(back)), (expected, *plain(back)), atol=0.05)


@pytest.mark.parametrize(
    ("capability", "width", "dtype", "asks"),
    [
        (8.0, 64, jnp.bfloat16, True),
        (7.5, 64, jnp.bfloat16, False),
        (0.0, 64, jnp.bfloat16, False),
        (9.0, 36, jnp.bfloat16, False),
        (9.0, 136, jnp.bfloat16, False),
        (9.0, 64, F32, False),
    ],
)
def test_cudnn_is_asked_where_it_can(capability, width, dtype, asks, monkeypatch):
    asked = []
    monkeypatch.setattr(layers, "compute_capability", lambda: capability)
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in_for_cudnn(asked))
    x = jnp.ones((2, 8, 2, width), dtype)
    attention(x, x, x)
    assert len(asked) == asks


@pytest.mark.parametrize(
    ("found", "expected"), [("9.0", 9.0), ("12.1", 12.1), ("7.5", 7.5), ("gfx942", 0.0), (None, 0.0)]
)
def test_the_devices_that_are_compiled_for_tell_their_capability(found, expected, monkeypatch):
    """Not those of this machine: a plan compiles for others."""
    seen = []

    def program():
        seen.append(mesh.compute_capability())
        return 0

    mesh.jit_on_mesh(program, mesh.one_device())()
    device = SimpleNamespace(compute_capability=found) if found else SimpleNamespace()
    token = mesh._device.set(device)
    seen.append(mesh.compute_capability())
    mesh._device.reset(token)
    assert seen == [0.0, expected] and mesh.compute_capability() == 0.0
