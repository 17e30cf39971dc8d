"""Attention on a TPU as one Pallas kernel, forward and backward, which keeps the matrix of weights on the chip.

XLA writes that matrix to memory and reads it back several times, and copies each head's 64 channels into a layout of
their own before and after. Here each program of the kernel reads the lanes of a few heads from (B, T, channels) where
they lie, and all keys and values of one row. Nothing is copied, padded or stored; the backward pass computes the matrix
again.

A tile has 128 lanes and a head usually 64, so two heads share the lanes. In each product the other head's lanes are set
to 0 in one operand: the matrix unit takes as long for 64 lanes as for 128.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import BFloat16, Bool, Float32, Shaped

from unclip_jax.arrays import Array
from unclip_jax.models.mesh import by_rows

LANES, TILE = 128, 16  # channels and places of the tile in which a TPU stores bfloat16
MATRIX = 2**18  # elements of one head's matrix in one program: what the smallest chips hold, with their keys and values
NEVER = -1e30  # logit where nothing is attended

Shape = Shaped[Array | jax.ShapeDtypeStruct, "B _ H D"]


def supported(query: Shape, key: Shape) -> bool:
    """Tells whether `tpu_attention` takes arrays of these shapes and types."""
    _, length, heads, width = query.shape
    return (
        query.dtype == jnp.bfloat16
        and LANES % width == 0
        and heads * width % LANES == 0
        and length >= TILE
        and _rows(length, key.shape[1]) > 0
    )


def tpu_attention(
    query: BFloat16[Array, "B T H D"],
    key: BFloat16[Array, "B S H D"],
    value: BFloat16[Array, "B S H D"],
    mask: Bool[Array, "#B 1 #T S"] | None,
) -> BFloat16[Array, "B T H D"]:
    """Computes `layers.attention` for inputs that are `supported`; mask None: all is attended."""
    bias = None if mask is None else jnp.where(mask[:, 0], 0.0, NEVER)
    rows = [x.reshape(*x.shape[:2], -1) for x in (query, key, value)]
    shared = bias is None or bias.shape[0] == 1

    def call(common: Array | None, rows: list[Array]) -> Array:
        return fused_attention(*rows, *([common] if shared else []), query.shape[-1])

    # The compiler cannot see into a kernel, and so cannot split it over devices.
    out = by_rows(call, bias if shared else None, rows if shared else [*rows, bias])
    return out.reshape(query.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def fused_attention(
    query: BFloat16[Array, "B T C"],
    key: BFloat16[Array, "B S C"],
    value: BFloat16[Array, "B S C"],
    bias: Float32[Array, "#B #T S"] | None,
    width: int,
) -> BFloat16[Array, "B T C"]:
    """softmax(query keyᵀ / √width + bias) value, head by head, softmax in float32.

    The C channels are those of all heads side by side, `width` each. The bias is shared by the heads; no gradient
    reaches it.
    """
    return _call(_forward, (query, key, value, bias), width)


def _fused_fwd(query: Array, key: Array, value: Array, bias: Array | None, width: int) -> tuple[Array, tuple]:
    return fused_attention(query, key, value, bias, width), (query, key, value, bias)


def _fused_bwd(width: int, residuals: tuple, dout: Array) -> tuple[Array, Array, Array, Array | None]:
    query, key, value, bias = residuals
    grads = _call(_backward, (query, key, value, bias, dout), width)
    return *grads, None if bias is None else jnp.zeros_like(bias)


fused_attention.defvjp(_fused_fwd, _fused_bwd)


def _rows(length: int, keys: int) -> int:
    """Queries per program: all, or the most that divide `length` and keep the matrix within MATRIX; 0: none do."""
    if length * keys <= MATRIX:
        return length
    fitting = [n for n in range(TILE, length, TILE) if length % n == 0 and n * keys <= MATRIX]
    return max(fitting, default=0)


def _call(kernel: Callable, operands: tuple, width: int) -> Any:
    """Runs the kernel over a grid of (rows of the batch, groups of lanes, tiles of queries)."""
    query, key, value, bias, *dout = operands
    batch, length, channels = query.shape
    keys = key.shape[1]

    # Each program takes `tile` queries, all keys, and up to four tiles of lanes while their keys fit on the chip.
    tile = _rows(length, keys)
    lanes = max(n * LANES for n in (4, 2, 1) if channels % (n * LANES) == 0 and (n == 1 or n * LANES * keys <= MATRIX))
    of_queries = pl.BlockSpec((None, tile, lanes), lambda b, c, t: (b, t, c))
    of_keys = pl.BlockSpec((None, keys, lanes), lambda b, c, t: (b, 0, c))
    specs, inputs = [of_queries, of_keys, of_keys], [query, key, value]

    # Axes of the bias that have size 1 are shared: by all rows of the batch, or by all queries.
    if bias is not None:
        own, tiled = bias.shape[0] > 1, bias.shape[1] > 1
        of_bias = pl.BlockSpec(
            (None, tile if tiled else 1, keys), lambda b, c, t: (b if own else 0, t if tiled else 0, 0)
        )
        specs, inputs = [*specs, of_bias], [*inputs, bias]

    # The gradients of keys and values are sums over the tiles of queries, kept in float32 on the chip.
    out_specs, shapes, scratch, products = of_queries, query, [], 2
    if dout:
        specs, inputs = [*specs, of_queries], [*inputs, *dout]
        out_specs, shapes, products = (of_queries, of_keys, of_keys), (query, key, value), 5
        scratch = [pltpu.VMEM((keys, lanes), jnp.float32)] * 2

    logits = batch * (channels // width) * length * keys
    return pl.pallas_call(
        functools.partial(kernel, width=width, biased=bias is not None),
        out_shape=jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), shapes),
        grid=(batch, channels // lanes, length // tile),
        in_specs=specs,
        out_specs=out_specs,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=products * 2 * logits * LANES,  # with the zeroed lanes, which take the matrix unit's time too
            transcendentals=logits,
            bytes_accessed=sum(a.size * a.dtype.itemsize for a in (*inputs, *jax.tree.leaves(shapes))),
        ),
        name="attention_backward" if dout else "attention",
    )(*inputs)


def _groups(lanes: int, width: int) -> Iterator[tuple[slice, list[Array]]]:
    """Yields slices of 128 lanes and, for each head in them, its lanes as bool (1, 128)."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    heads = [(lane >= first) & (lane < first + width) for first in range(0, LANES, width)]
    for start in range(0, lanes, LANES):
        yield slice(start, start + LANES), heads


def _product(a: Array, b: Array, contracted: tuple[tuple[int, ...], tuple[int, ...]]) -> Array:
    return jax.lax.dot_general(a, b, (contracted, ((), ())), preferred_element_type=jnp.float32)


ROWS, ACROSS, COLUMNS = ((1,), (0,)), ((1,), (1,)), ((0,), (0,))  # a b, a bᵀ and aᵀ b


def _weights(query: Array, key: Array, bias: Array | None, width: int) -> tuple[Array, Array]:
    """Softmax weights before their division by its sums (T, 1), and these sums."""
    logits = _product(query, key, ACROSS) * width**-0.5
    logits = logits if bias is None else logits + bias
    weights = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
    return weights, jnp.sum(weights, axis=1, keepdims=True)


def _only(lanes: Array, x: Array) -> Array:
    return jnp.where(lanes, x, jnp.zeros_like(x))


def _forward(query_ref: Any, key_ref: Any, value_ref: Any, *refs: Any, width: int, biased: bool) -> None:
    bias, (out_ref,) = (refs[0][...], refs[1:]) if biased else (None, refs)
    for at, heads in _groups(query_ref.shape[1], width):
        query, key, value = query_ref[:, at], key_ref[:, at], value_ref[:, at]
        out = jnp.zeros(query.shape, jnp.float32)
        for own in heads:
            weights, total = _weights(_only(own, query), key, bias, width)
            out = jnp.where(own, _product(weights.astype(value.dtype), value, ROWS) / total, out)
        out_ref[:, at] = out.astype(out_ref.dtype)


def _backward(query_ref: Any, key_ref: Any, value_ref: Any, *refs: Any, width: int, biased: bool) -> None:
    bias, refs = (refs[0][...], refs[1:]) if biased else (None, refs)
    dout_ref, dquery_ref, dkey_ref, dvalue_ref, dkey_sum, dvalue_sum = refs
    tile = pl.program_id(2)

    @pl.when(tile == 0)
    def _() -> None:
        dkey_sum[...] = jnp.zeros_like(dkey_sum)
        dvalue_sum[...] = jnp.zeros_like(dvalue_sum)

    # With P = softmax(S): dV = Pᵀ dO, dP = dO Vᵀ, dS = P ∘ (dP - rowsum(dP ∘ P)), dQ = dS K and dK = dSᵀ Q.
    for at, heads in _groups(query_ref.shape[1], width):
        query, key, value, dout = query_ref[:, at], key_ref[:, at], value_ref[:, at], dout_ref[:, at]
        dquery, dkey, dvalue = jnp.zeros(query.shape, jnp.float32), 0.0, 0.0
        for own in heads:
            own_query, own_dout = _only(own, query), _only(own, dout)
            weights, total = _weights(own_query, key, bias, width)
            weights = weights / total
            dvalue += _product(weights.astype(value.dtype), own_dout, COLUMNS)
            dweights = _product(own_dout, value, ACROSS)
            dlogits = weights * (dweights - jnp.sum(dweights * weights, axis=1, keepdims=True)) * width**-0.5
            dlogits = dlogits.astype(query.dtype)
            dquery = jnp.where(own, _product(dlogits, key, ROWS), dquery)
            dkey += _product(dlogits, own_query, COLUMNS)
        dquery_ref[:, at] = dquery.astype(dquery_ref.dtype)
        dkey_sum[:, at] += dkey
        dvalue_sum[:, at] += dvalue

    @pl.when(tile == pl.num_programs(2) - 1)
    def _() -> None:
        dkey_ref[...] = dkey_sum[...].astype(dkey_ref.dtype)
        dvalue_ref[...] = dvalue_sum[...].astype(dvalue_ref.dtype)
