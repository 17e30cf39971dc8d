"""The one transformer: pre-norm blocks with stacked parameters, scanned over depth so that 24 compile as fast as one.

Used by both CLIP towers, the decoder's text path and both priors. A mask hides keys; a memory adds keys and values of
other places: of a caption, or of places already read.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float, Float32, Int, Shaped

from unclip_jax.arrays import Array
from unclip_jax.models.layers import LayerNorm, Mask, Projections, attention


def _gelu(x: Array) -> tuple[Array, Array]:
    cdf = 0.5 + 0.5 * jax.lax.erf(x * 0.5**0.5)
    return x * cdf, cdf + x * jnp.exp(-0.5 * jnp.square(x)) * (2 * math.pi) ** -0.5


def _quick_gelu(x: Array) -> tuple[Array, Array]:
    gate = nn.sigmoid(1.702 * x)
    return x * gate, gate * (1 + 1.702 * x * (1 - gate))


ACTIVATIONS = {"gelu": _gelu, "quick_gelu": _quick_gelu}  # x → (value, derivative)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def activated(name: str, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """One of ACTIVATIONS of x, computed in float32.

    The derivative is computed along with the value, where XLA can fuse both into the product that gives x; a derivative
    in the backward pass would be a pass over memory of its own. The barriers keep XLA from fusing the activation into
    the next product, which would compute it again for every tile.
    """
    return jax.lax.optimization_barrier(ACTIVATIONS[name](x.astype(jnp.float32))[0].astype(x.dtype))


def _activated_forward(name: str, x: Array) -> tuple[Array, Array]:
    return jax.lax.optimization_barrier(tuple(y.astype(x.dtype) for y in ACTIVATIONS[name](x.astype(jnp.float32))))


activated.defvjp(_activated_forward, lambda name, slope, gradient: (slope * gradient,))


UNROLLED = 4  # most blocks without a loop: these compile as fast, and a CPU runs a loop's body on one thread


class Block(nn.Module):
    """x += MHA(LN(x)); x += MLP(LN(x)), with CLIP's initialisation for a stack of `depth` such blocks."""

    heads: int
    depth: int
    activation: str
    dtype: DTypeLike
    mlp_width: int | None

    @nn.compact
    def __call__(
        self,
        x: Float32[Array, "B T width"],
        mask: Mask | None,
        memory: Float[Array, "B S 2 {self.heads} D"] | None,
    ) -> tuple[Float32[Array, "B T width"], Float[Array, "B T 2 {self.heads} D"] | None]:
        """The new x and, where there is a memory, the keys and values of x's own places."""
        width = x.shape[-1]
        residual = (2 * self.depth) ** -0.5  # keeps the residual stream's variance independent of depth

        def dense(features: int, std: float, name: str) -> nn.Dense:
            return nn.Dense(features, dtype=self.dtype, kernel_init=nn.initializers.normal(std), name=name)

        # Attention over the memory's places, then x's own.
        project = Projections(width, 3, self.dtype, nn.initializers.normal(width**-0.5), name="qkv")
        heads = (*x.shape[:-1], self.heads, width // self.heads)
        query, key, value = (y.reshape(heads) for y in project(LayerNorm(name="norm_1")(x)))
        own = None
        if memory is not None:
            own = jnp.stack([key, value], axis=2)
            key, value = (jnp.concatenate([memory[:, :, i], y], axis=1) for i, y in enumerate((key, value)))
        h = attention(query, key, value, mask)
        x = x + dense(width, width**-0.5 * residual, "out")(h.reshape(x.shape)).astype(x.dtype)

        # The MLP.
        h = dense(self.mlp_width or 4 * width, (2 * width) ** -0.5, "mlp_in")(LayerNorm(name="norm_2")(x))
        h = dense(width, width**-0.5 * residual, "mlp_out")(activated(self.activation, h))
        return x + h.astype(x.dtype), own


def _is_sum(primitive: Any, *_: Any, **__: Any) -> bool:
    """Remat policy: saves the norms' sums, for which x would be read once more."""
    return primitive.name == "reduce_sum"


Output = Float32[Array, "B T width"]
Memory = Float[Array, "{self.depth} B _ 2 {self.heads} D"]  # keys (0) and values (1) of each block


class Transformer(nn.Module):
    """A stack of `depth` blocks on a float32 residual stream."""

    depth: int
    heads: int
    activation: str
    dtype: DTypeLike
    remat: bool
    mlp_width: int | None = None  # hidden units; None: four times the width

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T width"], mask: Mask | None = None, memory: Memory | None = None
    ) -> Output | tuple[Output, Memory]:
        """The last block's x; with a memory also the keys and values of x's own places, in the memory's form.

        mask: of T queries and T keys, or S + T keys with a memory of S places.
        memory: of `dtype`; its places are attended in front of x's own.
        """
        block = nn.remat(Block, prevent_cse=False, policy=_is_sum) if self.remat else Block

        def step(module: Block, carry: Array, memory: Array | None) -> tuple[Array, Array | None]:
            carry, own = module(carry, mask, memory)
            return carry, own

        # Parameters and memory have a leading axis of `depth`. A shallow stack is unrolled; see UNROLLED.
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
    """GLIDE's text path: features for every position of a caption, padding included (arXiv 2112.10741 and its code).

    Each position past the caption's end holds its own learned padding vector and is attended like any other. The empty
    caption is all padding. There is no attention mask.
    """

    vocab_size: int
    context: int
    width: int
    depth: int
    heads: int
    dtype: DTypeLike
    remat: bool

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "B {self.context}"], length: Int[Array, " B"]
    ) -> Float32[Array, "B {self.context} {self.width}"]:
        """Layer-normed features. length: tokens of each caption, padding left out."""
        table = nn.initializers.normal(0.01)
        x = nn.Embed(self.vocab_size, self.width, embedding_init=nn.initializers.normal(0.02), name="tokens")(tokens)
        x = x + self.param("positions", table, (self.context, self.width))[None]

        # Padding replaces the embeddings of tokens and positions alike.
        padding = self.param("padding", table, (self.context, self.width))
        real = jnp.arange(self.context)[None, :] < length[:, None]
        x = jnp.where(real[:, :, None], x, padding[None])

        x = Transformer(self.depth, self.heads, "gelu", self.dtype, self.remat, name="transformer")(x)
        return LayerNorm(name="norm")(x)


def last_real(x: Shaped[Array, "B T C"], length: Int[Array, " B"]) -> Shaped[Array, "B C"]:
    """Returns x at position length - 1 of each row."""
    # A sum instead of an index: the gradient of an index is a scatter, which a TPU does row after row.
    here = jnp.arange(x.shape[1])[None, :] == length[:, None] - 1
    return jnp.sum(jnp.where(here[:, :, None], x, 0), axis=1)
