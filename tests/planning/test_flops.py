"""The counter of FLOPs, against closed forms and against the gradients that JAX itself writes."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from shrink import CONFIGS, random_batch, small_stage

from unclip_jax import cli
from unclip_jax.planning import flops
from unclip_jax.stages import make_stage


def shape(*lengths):
    return jax.ShapeDtypeStruct(lengths, jnp.float32)


def count(function, *arguments):
    return flops.executed_flops(jax.make_jaxpr(function)(*arguments))


def convolution(x, kernel, strides=(1, 1), groups=1):
    names = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, strides, "SAME", dimension_numbers=names, feature_group_count=groups)


@pytest.mark.parametrize(
    ("function", "arguments", "expected"),
    [
        (jnp.matmul, (shape(3, 5), shape(5, 7)), 2 * 3 * 5 * 7),
        (lambda a, b: jnp.einsum("bthd,bshd->bhts", a, b), (shape(2, 3, 4, 5), shape(2, 7, 4, 5)), 16 * 3 * 7 * 5),
        (convolution, (shape(2, 8, 8, 3), shape(3, 3, 3, 5)), 2 * (2 * 8 * 8 * 5) * 9 * 3),
        (lambda x, k: convolution(x, k, (2, 2)), (shape(2, 8, 8, 3), shape(3, 3, 3, 5)), 2 * (2 * 4 * 4 * 5) * 9 * 3),
        (lambda x, k: convolution(x, k, groups=3), (shape(2, 8, 8, 6), shape(3, 3, 2, 9)), 2 * (2 * 8 * 8 * 9) * 9 * 2),
        # Zeros between the elements of the input are no work: each output has a quarter of the taps.
        (
            lambda x, k: jax.lax.conv_transpose(x, k, (2, 2), "SAME"),
            (shape(2, 8, 8, 3), shape(4, 4, 3, 5)),
            2 * (2 * 16 * 16 * 5) * 16 * 3 // 4,
        ),
        (jax.nn.gelu, (shape(9, 9),), 0),
    ],
    ids=["matrices", "batched", "convolution", "strided", "grouped", "transposed", "elementwise"],
)
def test_closed_forms(function, arguments, expected):
    assert count(function, *arguments) == expected


def test_loops_branches_and_calls():
    x, w = shape(3, 4), shape(6, 4, 4)
    one = 2 * 3 * 4 * 4

    def loop(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    assert count(loop, x, w) == 6 * one
    assert count(lambda x, w: jax.lax.scan(lambda x, _: (loop(x, w), None), x, None, length=5)[0], x, w) == 30 * one
    assert count(jax.jit(jax.checkpoint(loop)), x, w) == 6 * one
    assert count(lambda x, w: jax.lax.map(lambda w: x @ w, w), x, w) == 6 * one

    def branch(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w[0] @ w[1], lambda: x @ w[0])

    assert count(branch, x, w) == 2 * one
    with pytest.raises(ValueError, match="how often it runs"):
        count(lambda x, w: jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ w[0], x), x, w)


def test_kernels_and_maps_run_everywhere():
    def kernel(x, w, out):
        out[...] = x[...] @ w[...]

    def blocks(x, w):  # four blocks of eight rows
        whole = pl.BlockSpec((16, 16), lambda i: (0, 0))
        rows = pl.BlockSpec((8, 16), lambda i: (i, 0))
        return pl.pallas_call(kernel, out_shape=x, grid=(4,), in_specs=[rows, whole], out_specs=rows)(x, w)

    assert count(blocks, shape(32, 16), shape(16, 16)) == 2 * 32 * 16 * 16
    assert trained(lambda w, x: blocks(x, w), shape(16, 16), shape(32, 16)) == 3 * 2 * 32 * 16 * 16
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(P("rows"), P()), out_specs=P("rows"))
    assert count(mapped, shape(32, 16), shape(16, 16)) == 2 * 32 * 16 * 16


def trained(function, params, *rest):
    jaxpr = jax.make_jaxpr(function)(params, *rest)
    return flops.training_flops(jaxpr, [i < len(jax.tree.leaves(params)) for i in range(len(jaxpr.in_avals))])


def test_a_product_is_repeated_for_each_operand_that_is_trained():
    w, x = {"first": shape(4, 5), "second": shape(5, 5), "frozen": shape(5, 6)}, shape(3, 4)

    def loss(w, x):
        frozen = jax.lax.stop_gradient(w["frozen"])
        h = jnp.tanh(x @ w["first"])  # x needs no gradient
        return jnp.sum(jnp.tanh(h @ w["second"]) @ frozen)

    assert trained(loss, w, x) == 2 * 3 * (2 * 4 * 5 + 3 * 5 * 5 + 2 * 5 * 6)
    assert trained(lambda x, w: loss(w, x), x, w) == 2 * 3 * (2 * 4 * 5 + 2 * 5 * 5 + 2 * 5 * 6)  # by x alone


def test_what_a_loop_carries_is_trained_from_the_second_turn_on():
    w, x = shape(4, 4), shape(3, 4)

    def loss(w, x):
        return jnp.sum(jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=7)[0])

    assert trained(loss, w, x) == 7 * 3 * 2 * 3 * 4 * 4


def gradient(function, params, *rest):
    """FLOPs of loss and gradient as JAX writes them."""
    return count(jax.value_and_grad(function), params, *rest)


def network(params, x, strides=(2, 2)):
    x = jax.nn.silu(convolution(x, params["in"]))
    x = jax.nn.silu(convolution(x, params["half"], strides))
    x = x.reshape(len(x), -1, x.shape[-1])
    weights = jax.nn.softmax(jnp.einsum("btc,bsc->bts", x @ params["q"], x @ params["k"]))
    return jnp.sum((weights @ x) ** 2)


NETWORK = {"in": shape(3, 3, 3, 8), "half": shape(3, 3, 8, 8), "q": shape(8, 8), "k": shape(8, 8)}


def test_training_is_what_jax_differentiates_to():
    assert trained(network, NETWORK, shape(2, 8, 8, 3)) == gradient(network, NETWORK, shape(2, 8, 8, 3))


def test_remat_adds_what_it_computes_again():
    w, x = {"a": shape(4, 5), "b": shape(5, 6)}, shape(3, 4)

    def loss(w, x):
        block = jax.checkpoint(lambda w, x: jnp.tanh(jnp.tanh(x @ w["a"]) @ w["b"]))
        return jnp.sum(block(w, x))

    both = 2 * 3 * 4 * 5 + 2 * 3 * 5 * 6
    assert gradient(loss, w, x) - trained(loss, w, x) == both


@pytest.mark.parametrize("name", CONFIGS)
def test_stages_train_as_counted(name):
    """Every stage's own loss, with nothing computed twice, and its CLIP frozen."""
    stage, frozen, params = small_stage(name)
    rest = frozen, random_batch(stage, 4), jax.random.key(0)
    counted = trained(lambda *arguments: stage.loss(*arguments)[0], params, *rest)
    assert counted == gradient(lambda *arguments: stage.loss(*arguments)[0], params, *rest) > 0


@pytest.mark.parametrize(
    ("name", "side", "expected"),
    [
        # Counted by torch's FlopCounterMode on the public code of GLIDE (glide_text2im/unet.py) at these sizes.
        pytest.param("upsampler_256", 256, 8.49857e12, marks=pytest.mark.slow),
        ("upsampler_1024", 1024, 19.84321e12),
        ("decoder", 64, 1.58870e12),
    ],
)
def test_networks_are_as_large_as_the_public_code(name, side, expected):
    config = cli.load_config(f"configs/{name}.py:paper")
    stage = make_stage(config)
    x = shape(1, side, side, 3 if name == "decoder" else 6)
    conditioning = (shape(1, 2048), shape(1, 260, 2048)) if name == "decoder" else ()
    arguments = x, jax.ShapeDtypeStruct((1,), jnp.int32), *conditioning
    unet = stage._unet()
    params = jax.eval_shape(unet.init, jax.random.key(0), *arguments)
    assert count(unet.apply, params, *arguments) == pytest.approx(expected, abs=0.5e7)  # its last digit
