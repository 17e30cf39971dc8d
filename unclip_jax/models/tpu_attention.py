"""Attention on a TPU as one kernel, forward and backward, that keeps its matrix on the chip.

XLA writes the matrix of weights to memory and reads it back several times, and moves each head's 64 channels to places
of their own before and after. Here a program of the kernel takes the lanes of a few heads from (B, T, channels) as they
lie, and one row's keys and values whole, so that nothing is moved, padded or kept; the backward pass makes the matrix
again. Of 128 lanes, those of other heads are set to 0 in one of a product's two sides: a product over 64 lanes takes
the matrix unit as long as one over 128.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from unclip_jax.models.mesh import by_rows

LANES, TILE = 128, 16  # of the unit that bfloat16 is stored in: channels and places
MATRIX = 2**18  # elements of one head's matrix that are worked on at once; with keys' own, what the smallest chips hold
NEVER = -1e30  # a logit where nothing is attended


def supported(query, key) -> bool:
    """Tells whether `tpu_attention` takes query (B, T, H, D) and key (B, S, H, D)."""
    _, length, heads, width = query.shape
    return (
        query.dtype == jnp.bfloat16
        and LANES % width == 0
        and heads * width % LANES == 0
        and length >= TILE
        and _rows(length, key.shape[1]) > 0
    )


def tpu_attention(query, key, value, mask):
    """Computes `layers.attention` for inputs that are `supported`; mask bool (B or 1, 1, T or 1, S), or None."""
    bias = None if mask is None else jnp.where(mask[:, 0], 0.0, NEVER)
    rows = [x.reshape(*x.shape[:2], -1) for x in (query, key, value)]
    shared = bias is None or bias.shape[0] == 1

    def call(common, rows):
        return fused_attention(*rows, *([common] if shared else []), query.shape[-1])

    # A kernel is opaque to the compiler, which could not split it over devices.
    out = by_rows(call, bias if shared else None, rows if shared else [*rows, bias])
    return out.reshape(query.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def fused_attention(query, key, value, bias, width: int):
    """softmax(query keyᵀ / √width + bias) value, head by head, softmax in float32.

    query (B, T, C), key and value (B, S, C) bfloat16, C channels of heads of `width`; bias (B or 1, T or 1, S) float32,
    the same for every head, or None. No gradient reaches the bias.
    """
    return _call(_forward, (query, key, value, bias), width)


def _fused_fwd(query, key, value, bias, width):
    return fused_attention(query, key, value, bias, width), (query, key, value, bias)


def _fused_bwd(width, kept, gradient):
    query, key, value, bias = kept
    grads = _call(_backward, (query, key, value, bias, gradient), width)
    return *grads, None if bias is None else jnp.zeros_like(bias)


fused_attention.defvjp(_fused_fwd, _fused_bwd)


def _rows(length: int, keys: int) -> int:
    """Queries of one program: all, or the largest divisor that keeps their matrix within MATRIX elements."""
    if length * keys <= MATRIX:
        return length
    fitting = [n for n in range(TILE, length, TILE) if length % n == 0 and n * keys <= MATRIX]
    return max(fitting, default=0)


def _call(kernel, operands, width):
    """The kernel over a grid of (examples, groups of lanes, tiles of queries)."""
    query, key, value, bias, *gradient = operands
    batch, length, channels = query.shape
    keys = key.shape[1]
    rows = _rows(length, keys)
    lanes = max(n * LANES for n in (4, 2, 1) if channels % (n * LANES) == 0 and (n == 1 or n * LANES * keys <= MATRIX))

    def block(rows, tiled, array=None):
        whose = (lambda b: b) if array is None or array.shape[0] > 1 else (lambda b: 0)
        if array is None:
            return pl.BlockSpec((None, rows, lanes), lambda b, c, t: (b, t if tiled else 0, c))
        return pl.BlockSpec((None, rows, keys), lambda b, c, t: (whose(b), t if tiled else 0, 0))

    of_queries, of_keys = block(rows, True), block(keys, False)
    specs, inputs = [of_queries, of_keys, of_keys], [query, key, value]
    if bias is not None:
        tiled = bias.shape[1] > 1
        specs, inputs = [*specs, block(rows if tiled else 1, tiled, bias)], [*inputs, bias]
    out_specs, shapes, scratch, products = of_queries, query, [], 2
    if gradient:
        specs, inputs = [*specs, of_queries], [*inputs, *gradient]
        out_specs, shapes, products = (of_queries, of_keys, of_keys), (query, key, value), 5
        scratch = [pltpu.VMEM((keys, lanes), jnp.float32)] * 2
    logits = batch * (channels // width) * length * keys
    return pl.pallas_call(
        functools.partial(kernel, width=width, biased=bias is not None),
        out_shape=jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), shapes),
        grid=(batch, channels // lanes, length // rows),
        in_specs=specs,
        out_specs=out_specs,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=products * 2 * logits * LANES,  # what the matrix unit is busy with
            transcendentals=logits,
            bytes_accessed=sum(a.size * a.dtype.itemsize for a in (*inputs, *jax.tree.leaves(shapes))),
        ),
        name="attention_backward" if gradient else "attention",
    )(*inputs)


def _groups(lanes: int, width: int):
    """Slices of 128 lanes and, of each, (1, 128) bool for every head in it: which lanes are the head's."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    heads = [(lane >= first) & (lane < first + width) for first in range(0, LANES, width)]
    for start in range(0, lanes, LANES):
        yield slice(start, start + LANES), heads


def _product(a, b, contracted):
    return jax.lax.dot_general(a, b, (contracted, ((), ())), preferred_element_type=jnp.float32)


ROWS, ACROSS, COLUMNS = ((1,), (0,)), ((1,), (1,)), ((0,), (0,))  # a b, a bᵀ and aᵀ b


def _weights(query, key, bias, width):
    """exp(logits - their maximum), and its sums (T, 1)."""
    logits = _product(query, key, ACROSS) * width**-0.5
    logits = logits if bias is None else logits + bias
    weights = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
    return weights, jnp.sum(weights, axis=1, keepdims=True)


def _only(lanes, x):
    return jnp.where(lanes, x, jnp.zeros_like(x))


def _forward(query_ref, key_ref, value_ref, *refs, width, biased):
    bias, (out_ref,) = (refs[0][...], refs[1:]) if biased else (None, refs)
    for at, heads in _groups(query_ref.shape[1], width):
        query, key, value = query_ref[:, at], key_ref[:, at], value_ref[:, at]
        out = jnp.zeros(query.shape, jnp.float32)
        for own in heads:
            weights, total = _weights(_only(own, query), key, bias, width)
            out = jnp.where(own, _product(weights.astype(value.dtype), value, ROWS) / total, out)
        out_ref[:, at] = out.astype(out_ref.dtype)


def _backward(query_ref, key_ref, value_ref, *refs, width, biased):
    bias, refs = (refs[0][...], refs[1:]) if biased else (None, refs)
    gradient_ref, dquery_ref, dkey_ref, dvalue_ref, dkey_sum, dvalue_sum = refs
    tile = pl.program_id(2)

    @pl.when(tile == 0)
    def _():
        dkey_sum[...] = jnp.zeros_like(dkey_sum)
        dvalue_sum[...] = jnp.zeros_like(dvalue_sum)

    for at, heads in _groups(query_ref.shape[1], width):
        query, key, value, gradient = query_ref[:, at], key_ref[:, at], value_ref[:, at], gradient_ref[:, at]
        dquery, dkey, dvalue = jnp.zeros(query.shape, jnp.float32), 0.0, 0.0
        for own in heads:
            own_query, own_gradient = _only(own, query), _only(own, gradient)
            weights, total = _weights(own_query, key, bias, width)
            weights = weights / total
            dvalue += _product(weights.astype(value.dtype), own_gradient, COLUMNS)
            dweights = _product(own_gradient, value, ACROSS)
            dlogits = weights * (dweights - jnp.sum(dweights * weights, axis=1, keepdims=True)) * width**-0.5
            dlogits = dlogits.astype(query.dtype)
            dquery = jnp.where(own, _product(dlogits, key, ROWS), dquery)
            dkey += _product(dlogits, own_query, COLUMNS)
        dquery_ref[:, at] = dquery.astype(dquery_ref.dtype)
        dkey_sum[:, at] += dkey
        dvalue_sum[:, at] += dvalue

    @pl.when(tile == pl.num_programs(2) - 1)
    def _():
        dkey_ref[...] = dkey_sum[...].astype(dkey_ref.dtype)
        dvalue_ref[...] = dvalue_sum[...].astype(dvalue_ref.dtype)
