"""The one transformer: pre-norm blocks with stacked parameters, scanned over depth so that 24 compile as fast as one.

Used by both CLIP towers, the decoder's text path and both priors. What is attended is said by a mask, and by keys and
values from elsewhere: a caption's, or those of places already read.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.models.layers import LayerNorm, Mask, Projections, attention


def _gelu(x):
    cdf = 0.5 + 0.5 * jax.lax.erf(x * 0.5**0.5)
    return x * cdf, cdf + x * jnp.exp(-0.5 * jnp.square(x)) * (2 * math.pi) ** -0.5


def _quick_gelu(x):
    gate = nn.sigmoid(1.702 * x)
    return x * gate, gate * (1 + 1.702 * x * (1 - gate))


ACTIVATIONS = {"gelu": _gelu, "quick_gelu": _quick_gelu}  # what they give, and their derivative


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def activated(name: str, x):
    """One of ACTIVATIONS of x, computed in float32.

    Its derivative is computed beside it, at the end of the product that x comes from; XLA would run a pass of its own
    for it. The barriers: XLA would compute the activation within the next product, for every tile of it again.
    """
    return jax.lax.optimization_barrier(ACTIVATIONS[name](x.astype(jnp.float32))[0].astype(x.dtype))


def _activated_forward(name, x):
    return jax.lax.optimization_barrier(tuple(y.astype(x.dtype) for y in ACTIVATIONS[name](x.astype(jnp.float32))))


activated.defvjp(_activated_forward, lambda name, slope, gradient: (slope * gradient,))


UNROLLED = 4  # blocks: a stack this shallow compiles as fast without its loop, and a CPU runs loops on one thread


class Block(nn.Module):
    """x += MHA(LN(x)); x += MLP(LN(x)), with CLIP's initialisation for a stack of `depth` such blocks.

    `memory` as in Transformer, for one block; gives x and its keys and values (B, T, 2, heads, head width), or None.
    """

    heads: int
    depth: int
    activation: str
    dtype: jnp.dtype
    mlp_width: int | None

    @nn.compact
    def __call__(self, x, mask: Mask | None, memory):
        width = x.shape[-1]
        residual = (2 * self.depth) ** -0.5  # keeps the residual stream's variance independent of depth

        def dense(features, std, name):
            return nn.Dense(features, dtype=self.dtype, kernel_init=nn.initializers.normal(std), name=name)

        project = Projections(width, 3, self.dtype, nn.initializers.normal(width**-0.5), name="qkv")
        heads = (*x.shape[:-1], self.heads, width // self.heads)
        query, key, value = (y.reshape(heads) for y in project(LayerNorm(name="norm_1")(x)))
        own = None
        if memory is not None:
            own = jnp.stack([key, value], axis=2)
            key, value = (jnp.concatenate([memory[:, :, i], y], axis=1) for i, y in enumerate((key, value)))
        h = attention(query, key, value, mask)
        x = x + dense(width, width**-0.5 * residual, "out")(h.reshape(x.shape)).astype(x.dtype)

        h = dense(self.mlp_width or 4 * width, (2 * width) ** -0.5, "mlp_in")(LayerNorm(name="norm_2")(x))
        h = dense(width, width**-0.5 * residual, "mlp_out")(activated(self.activation, h))
        return x + h.astype(x.dtype), own


def _is_sum(primitive, *_, **__) -> bool:
    """Remat policy: saves the norms' sums, for which x would be read once more."""
    return primitive.name == "reduce_sum"


class Transformer(nn.Module):
    """(B, T, width) → (B, T, width) float32 residual stream. mask as in `layers.attention`, of T queries and T keys, or
    S + T with a memory.

    memory (depth, B, S, 2, heads, head width), of `dtype`: each block's keys and values of S other places, attended in
    front of x's own. With it comes back what x adds to such a memory, (depth, B, T, 2, heads, head width).
    """

    depth: int
    heads: int
    activation: str
    dtype: jnp.dtype
    remat: bool
    mlp_width: int | None = None  # hidden units; None: four times the width

    @nn.compact
    def __call__(self, x, mask: Mask | None = None, memory=None):
        block = nn.remat(Block, prevent_cse=False, policy=_is_sum) if self.remat else Block

        def step(module, carry, memory):
            carry, own = module(carry, mask, memory)
            return carry, own

        scanned = nn.scan(
            step,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.depth,
            unroll=self.depth if self.depth <= UNROLLED else 1,
            metadata_params={nn.PARTITION_NAME: "depth"},
        )
        block = block(self.heads, self.depth, self.activation, self.dtype, self.mlp_width, name="blocks")
        x, own = scanned(block, x.astype(jnp.float32), memory)
        return x if memory is None else (x, own)


class TextTransformer(nn.Module):
    """GLIDE's text path: tokens → features for every position, padding included (arXiv 2112.10741 and its code).

    Positions past a caption's length hold a learned padding vector of their own and are attended like any other; the
    empty caption is all padding. No attention mask.
    """

    vocab_size: int
    context: int
    width: int
    depth: int
    heads: int
    dtype: jnp.dtype
    remat: bool

    @nn.compact
    def __call__(self, tokens, length):
        """tokens (B, context) int32, length (B,) int32 real tokens → (B, context, width) float32, layer-normed."""
        table = nn.initializers.normal(0.01)
        x = nn.Embed(self.vocab_size, self.width, embedding_init=nn.initializers.normal(0.02), name="tokens")(tokens)
        x = x + self.param("positions", table, (self.context, self.width))[None]
        padding = self.param("padding", table, (self.context, self.width))
        real = jnp.arange(self.context)[None, :] < length[:, None]
        x = jnp.where(real[:, :, None], x, padding[None])
        x = Transformer(self.depth, self.heads, "gelu", self.dtype, self.remat, name="transformer")(x)
        return LayerNorm(name="norm")(x)


def last_real(x, length):
    """Returns the rows of x (B, T, C) at position length - 1: (B, C)."""
    # A sum instead of an index: the gradient of an index is a scatter, which a TPU does row after row.
    here = jnp.arange(x.shape[1])[None, :] == length[:, None] - 1
    return jnp.sum(jnp.where(here[:, :, None], x, 0), axis=1)
