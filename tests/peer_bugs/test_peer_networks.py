"""What other code bases got wrong inside the networks: skips, the order of heads, timesteps, padding, activations."""

import functools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shrink import random_batch, random_params, small_config, small_stage

from unclip_jax.bundle import load_bundle, save_bundle
from unclip_jax.models.clip import TextTower
from unclip_jax.models.layers import GroupNorm, LayerNorm, timestep_embedding
from unclip_jax.models.prior_diffusion import DiffusionPrior
from unclip_jax.models.transformer import TextTransformer, activated
from unclip_jax.models.unet import AttentionBlock, UNet
from unclip_jax.pretrained.layers import deinterleaved
from unclip_jax.stages import make_stage

F32 = jnp.float32


def unet(channel_mult, dtype):
    """One block per level, of 8 channels times `channel_mult`."""
    return UNet(
        channels=8,
        channel_mult=channel_mult,
        res_blocks=1,
        attention=(),
        middle_attention=False,
        head_channels=8,
        heads=(1, 1),
        norm_groups=4,
        scale_shift=True,
        resample_blocks=True,
        out_channels=3,
        dropout=0.0,
        dtype=dtype,
        remat=False,
    )


def random_variables(model, *inputs):
    """Of a module, as its `apply` takes them; none of them zero."""
    return random_params(SimpleNamespace(init=lambda key: model.init(key, *inputs)))


def test_every_level_gets_its_skips_back_the_highest_resolution_too():
    """DALLE2-pytorch (fixed in e6bb75e) lost the skip of the first convolution, the one at full resolution."""
    x, t = jnp.zeros((1, 8, 8, 3)), jnp.zeros((1,), jnp.int32)
    params = jax.eval_shape(unet((1, 3), F32).init, jax.random.key(0), x, t)["params"]
    # By hand, as in ADM: the way down leaves 8 (first convolution), 8, 8 (halved), 24; up takes the last left first.
    expected = {"up_1_0_res": 24 + 24, "up_1_1_res": 24 + 8, "up_0_0_res": 24 + 8, "up_0_1_res": 8 + 8}
    up = {name: block["norm_in"]["scale"].shape[0] for name, block in params.items() if name.startswith("up_")}
    assert up == expected | {"up_1_resample": 24}


def test_heads_of_public_weights_are_read_in_their_own_order():
    """diffusers!6730: ADM's weights keep query, key and value of each head together; read apart they give garbage."""
    heads, width, pixels = 2, 8, 4
    rng = np.random.default_rng(0)
    x, kernel, bias = rng.normal(size=(1, 2, 2, width)), rng.normal(size=(width, 3 * width)), rng.normal(size=3 * width)

    grouped = x.reshape(1, pixels, 4, -1)
    normed = (grouped - grouped.mean((1, 3), keepdims=True)) / np.sqrt(grouped.var((1, 3), keepdims=True) + 1e-5)
    qkv = (normed.reshape(pixels, width) @ kernel + bias).T  # channels first, as QKVAttentionLegacy has them
    q, k, v = np.split(qkv.reshape(heads, 3 * width // heads, pixels), 3, axis=1)
    weights = np.exp(np.einsum("hct,hcs->hts", q, k) / math.sqrt(width // heads))
    weights /= weights.sum(-1, keepdims=True)
    attended = np.einsum("hts,hcs->hct", weights, v).reshape(width, pixels).T

    params = {
        "norm": {"scale": np.ones(width), "bias": np.zeros(width)},
        "qkv": deinterleaved({"kernel": kernel, "bias": bias}, heads, 3),
        "out": {"kernel": np.eye(width), "bias": np.zeros(width)},
    }
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, F32), params)
    ours = AttentionBlock(heads, 4, F32).apply({"params": params}, jnp.asarray(x, F32), None, None)
    np.testing.assert_allclose(ours - x, attended.reshape(x.shape), atol=1e-5)


def test_timestep_embedding_has_cosines_first_and_glides_frequencies():
    """diffusers!1369 (Flax): sines first, or frequencies to 10000^(k / (half - 1)): another model's embedding."""
    half = 5
    rows = [[t * 10000 ** (-k / half) for k in range(half)] for t in (0, 1, 999)]
    expected = [[*map(math.cos, angles), *map(math.sin, angles)] for angles in rows]
    np.testing.assert_allclose(timestep_embedding(jnp.array([0, 1, 999]), 2 * half), expected, atol=2e-4)


def test_neighbouring_timesteps_are_told_apart_in_bfloat16():
    """DiffSynth-Studio#562: timesteps cast to bfloat16, in which 995, 996 and 997 are one."""
    model, t = unet((1,), jnp.bfloat16), jnp.array([995, 996, 997])
    x = jnp.ones((3, 2, 2, 3))
    variables = jax.tree.map(lambda leaf: 3 * leaf, random_variables(model, x, t))
    out = np.asarray(jax.jit(model.apply)(variables, x, t))
    assert np.abs(out[0] - out[1]).max() > 1e-2 and np.abs(out[1] - out[2]).max() > 1e-2
    assert timestep_embedding(t, 8).dtype == F32


READERS = {
    "prior": (
        DiffusionPrior(4, "own", 20, 6, 8, 1, 2, F32, False),
        lambda tokens, length: (jnp.ones((1, 4)), jnp.array([500]), tokens, length, jnp.ones((1, 4))),
    ),
    "decoder": (TextTransformer(20, 6, 8, 1, 2, F32, False), lambda tokens, length: (tokens, length)),
    "clip": (TextTower(4, 20, 6, 8, 1, 2, "gelu", F32, False), lambda tokens, length: (tokens, length)),
}


@pytest.mark.parametrize("name", READERS)
def test_token_zero_is_a_word_and_padding_is_told_by_length(name):
    """DALLE2-pytorch f988207: id 0, which is "!", taken for padding; diffusers#2201: pictures change with the padding.
    """
    model, arguments = READERS[name]
    tokens, length = jnp.array([[5, 0, 7, 0, 0, 0]]), jnp.array([3])
    params = random_variables(model, *arguments(tokens, length))

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def read(params, tokens):
        out = jax.tree.leaves(model.apply(params, *arguments(tokens, length)))[0]
        return jnp.sum(jnp.square(out)), out

    (_, out), slopes = read(params, tokens)
    np.testing.assert_array_equal(out, read(params, tokens.at[0, 3:].set(9))[0][1])
    table = np.abs(np.asarray(slopes["params"]["tokens"]["embedding"])).max(axis=1)
    assert table[0] > 0 and table[5] > 0


def test_activation_is_the_one_that_was_trained_with(tmp_path):
    """open_clip#771: QuickGELU and GELU exchanged when weights were loaded again, and papers reported the numbers."""
    x = np.linspace(-4, 4, 33)
    exact = {"quick_gelu": x / (1 + np.exp(-1.702 * x)), "gelu": x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))}
    embeddings, identities = {}, set()
    for activation, expected in exact.items():
        np.testing.assert_allclose(activated(activation, jnp.asarray(x, F32)), expected, atol=2e-6)
        config = small_config("clip").unlock()
        config.model.activation = activation
        params, images = random_params(make_stage(config)), random_batch(make_stage(config), 2)["image"]
        identities.add(save_bundle(str(tmp_path / activation), "clip", config, params, None, "", {}))
        loaded = load_bundle(str(tmp_path / activation))
        embed = jax.jit(make_stage(loaded.config).embed_images)
        embeddings[activation] = np.asarray(embed(loaded.params, images))
        np.testing.assert_array_equal(embeddings[activation], embed(params, images))
    assert np.abs(embeddings["gelu"] - embeddings["quick_gelu"]).max() > 1e-4
    assert len(identities) == 2  # a decoder of one is refused beside the other


def test_norms_add_1e_5_to_the_variance():
    """mindone!225: LayerNorm with another epsilon than the weights were trained with."""
    small = np.array([[3e-3, -3e-3]], np.float32)
    expected = small / math.sqrt(9e-6 + 1e-5)
    ones = {"scale": jnp.ones(2), "bias": jnp.zeros(2)}
    np.testing.assert_allclose(LayerNorm().apply({"params": ones}, small), expected, rtol=1e-4)
    ours = GroupNorm(1).apply({"params": ones}, small[:, None, None, :])
    np.testing.assert_allclose(ours.reshape(1, 2), expected, rtol=1e-4)


@pytest.mark.parametrize("name", ["clip", "prior_diffusion", "decoder", "upsampler_256"])
def test_weights_stay_float32_where_products_are_bfloat16(name):
    """maxdiffusion#73: training changed nothing, since weights kept in bfloat16 swallowed every update."""
    stage = small_stage(name)[0]
    config = stage.config.copy_and_resolve_references().unlock()
    config.dtype = "bfloat16"
    shapes = jax.eval_shape(make_stage(config, stage.clip).init, jax.random.key(0))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(shapes)} == {"float32"}
