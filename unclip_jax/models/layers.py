"""Shared layers: timestep embedding, attention, convolution and projection with the papers' initialisation.

Precision: parameters are float32; matrix products and convolutions run in `dtype`; norms, softmax and timestep
embeddings run in float32.
"""

import functools
import math
from dataclasses import dataclass, field

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Float32, Int

from unclip_jax.arrays import Array, Key
from unclip_jax.models.mesh import compute_capability, platform

# Uniform in +-1/sqrt(fan_in): PyTorch's default, which the papers' code keeps for convolutions and linear layers.
fan_in_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

Dense = functools.partial(nn.Dense, kernel_init=fan_in_uniform)
Conv3x3 = functools.partial(nn.Conv, kernel_size=(3, 3), padding=1, kernel_init=fan_in_uniform)
LayerNorm = functools.partial(nn.LayerNorm, epsilon=1e-5, dtype=jnp.float32)  # float32 throughout, as in their code
zeros = {"kernel_init": nn.initializers.zeros, "bias_init": nn.initializers.zeros}


def timestep_embedding(timesteps: Int[Array, " B"], width: int) -> Float32[Array, "B {width}"]:
    """Sinusoids [cos(t f), sin(t f)], f_k = 10000^(-k / (width / 2)); `width` is even."""
    half = width // 2
    frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimestepMLP(nn.Module):
    """Timestep embedding: sinusoids of `width`, linear, SiLU, linear."""

    width: int
    out: int

    @nn.compact
    def __call__(self, timesteps: Int[Array, " B"]) -> Float32[Array, "B {self.out}"]:
        x = Dense(self.out, name="in")(timestep_embedding(timesteps, self.width))
        return Dense(self.out, name="out")(nn.silu(x))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mask:
    """Attention mask of T queries over S keys: a query attends to the keys that both fields allow.

    Causality stands by itself because cuDNN's kernel implements it, and skips the hidden part of the matrix.
    """

    causal: bool = field(default=False, metadata={"static": True})  # query i attends to keys 0 ... i + S - T
    keys: Bool[Array, "#B S"] | None = None  # True where attended; None: everywhere

    def dense(self, length: int, keys: int) -> Bool[Array, "_ 1 _ {keys}"] | None:
        """Mask (B or 1, 1, T or 1, S) for T = `length` queries and S = `keys`; None where all is attended."""
        parts = [jnp.tril(jnp.ones((1, 1, length, keys), bool), keys - length)] if self.causal else []
        parts += [] if self.keys is None else [self.keys[:, None, None]]
        return functools.reduce(jnp.logical_and, parts) if parts else None


def attention(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S H D"],
    value: Float[Array, "B S H D"],
    mask: Mask | None = None,
) -> Float[Array, "B T H D"]:
    """Scaled dot-product attention of H heads, softmax in float32; mask None: every query attends to every key.

    Inside `jit_on_mesh`, which knows the devices, bfloat16 goes to a fused kernel, which never writes the matrix of
    weights to memory: on a TPU our own, on an NVIDIA GPU cuDNN's (from Ampere on).
    """
    mask = mask or Mask()
    if platform() == "tpu":
        from unclip_jax.models.tpu_attention import supported, tpu_attention  # it imports Pallas, which takes long

        if supported(query, key):
            return tpu_attention(query, key, value, mask.dense(query.shape[1], key.shape[1]))
    if _cudnn_takes(query):
        return _cudnn_attention(query, key, value, mask)
    dense = mask.dense(query.shape[1], key.shape[1])
    return plain_attention(*(x.swapaxes(1, 2) for x in (query, key, value)), dense).swapaxes(1, 2)


def _cudnn_takes(query: Array) -> bool:
    length, width = query.shape[1], query.shape[-1]
    fits = query.dtype == jnp.bfloat16 and width % 8 == 0 and width <= 128
    return compute_capability() >= 8 and fits and length > 1  # a single query is too little work for a kernel


def _cudnn_attention(query: Array, key: Array, value: Array, mask: Mask) -> Array:
    """`attention` by cuDNN. JAX refuses to differentiate odd lengths, so these get one more place, which is hidden."""
    rows, length, keys = *query.shape[:2], key.shape[1]
    padded = [jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (query, key, value)]

    # The cheapest way to hide the padding: causality does, then a length per row, else a mask in memory.
    if mask.keys is None and mask.causal and length == keys:
        options = {"is_causal": True}  # cuDNN's starts at the first key, so it hides the padded last one
    elif mask.keys is None and not mask.causal:
        options = {"key_value_seq_lengths": jnp.full((rows,), keys, jnp.int32)} if keys % 2 else {}
    else:
        dense = jnp.broadcast_to(mask.dense(length, keys), (rows, 1, length, keys))
        options = {"mask": jnp.pad(dense, ((0, 0), (0, 0), (0, length % 2), (0, keys % 2)))}
    return jax.nn.dot_product_attention(*padded, implementation="cudnn", **options)[:, :length]


@jax.custom_vjp
def plain_attention(
    query: Float[Array, "B H T D"],
    key: Float[Array, "B H S D"],
    value: Float[Array, "B H S D"],
    mask: Bool[Array, "#B 1 #T S"] | None,
) -> Float[Array, "B H T D"]:
    """`attention` by XLA alone, with the heads' axis in front of the places' and a dense mask.

    Differentiated by hand: dS = P ∘ (dP - rowsum(dO ∘ O)) / √D. JAX's own took a CPU three times as long.
    """
    return _plain_forward(query, key, value, mask)[0]


def _plain_forward(query: Array, key: Array, value: Array, mask: Array | None) -> tuple[Array, tuple]:
    logits = _product("bhtd,bhsd->bhts", query, key) * query.shape[-1] ** -0.5
    if mask is not None:
        logits = jnp.where(mask, logits, -0.7 * jnp.finfo(jnp.float32).max)
    weights = jax.nn.softmax(logits).astype(query.dtype)
    out = _product("bhts,bhsd->bhtd", weights, value).astype(query.dtype)
    return out, (query, key, value, mask, weights, out)


def _plain_backward(residuals: tuple, dout: Array) -> tuple[Array, Array, Array, None]:
    query, key, value, mask, weights, out = residuals
    dweights = _product("bhtd,bhsd->bhts", dout, value)
    mean = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    dlogits = weights.astype(jnp.float32) * (dweights - mean) * query.shape[-1] ** -0.5
    if mask is not None:
        dlogits = jnp.where(mask, dlogits, 0.0)
    dlogits = dlogits.astype(query.dtype)
    grads = (
        _product("bhts,bhsd->bhtd", dlogits, key),
        _product("bhts,bhtd->bhsd", dlogits, query),
        _product("bhts,bhtd->bhsd", weights, dout),
    )
    return *(grad.astype(query.dtype) for grad in grads), None


plain_attention.defvjp(_plain_forward, _plain_backward)


def _product(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


class Projections(nn.Module):
    """Projects to `parts` outputs from one kernel, split before multiplying to avoid a copy."""

    features: int  # of each output
    parts: int
    dtype: DTypeLike
    kernel_init: nn.initializers.Initializer = fan_in_uniform

    @nn.compact
    def __call__(self, x: Float[Array, "*places C"]) -> list[Float[Array, "*places {self.features}"]]:
        total = self.parts * self.features
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], total))
        bias = self.param("bias", nn.initializers.zeros, (total,))
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        split = (jnp.split(value, self.parts, axis=-1) for value in (kernel, bias))
        return [_add_bias(x @ k, b) for k, b in zip(*split, strict=True)]


@jax.custom_vjp
def _add_bias(x: Float[Array, "*places C"], bias: Float[Array, " C"]) -> Float[Array, "*places C"]:
    """x + bias, whose gradient is summed in float32. JAX's own sums in bfloat16, which takes a TPU longer."""
    bias = bias.reshape((1,) * (x.ndim - 1) + bias.shape)
    return (x.astype(jnp.float32) + bias).astype(x.dtype)


def _add_bias_backward(_: None, dout: Array) -> tuple[Array, Array]:
    rows = tuple(range(dout.ndim - 1))
    if platform() != "tpu" or dout.dtype != jnp.bfloat16:
        return dout, jnp.sum(dout.astype(jnp.float32), axis=rows)

    # After an attention kernel there is nothing to fuse the sum into, and the matrix unit needs a third of its time.
    # Eight rows of ones, because XLA would turn a product with a single row back into a plain sum.
    ones = jnp.ones((8, *dout.shape[:-1]), dout.dtype)
    contracted = tuple(axis + 1 for axis in rows), rows
    return dout, jax.lax.dot_general(ones, dout, (contracted, ((), ())), preferred_element_type=jnp.float32)[0]


_add_bias.defvjp(lambda x, bias: (_add_bias(x, bias), None), _add_bias_backward)


def dropout(x: Float[Array, "*shape"], rate: float, key: Key) -> Float[Array, "*shape"]:
    """Zeroes a share `rate` of x's elements and scales the others up; the same elements on every mesh.

    The random bits are hashes of the elements' positions ("lowbias32", with the key mixed in), which is random enough
    for dropout. Threefry, jax.random's generator, took an eighth of an upsampler's training step on a TPU.
    """
    first, second = jax.random.bits(key, (2,))
    strides = [math.prod(x.shape[axis + 1 :]) for axis in range(x.ndim)]
    numbers = (jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * stride for axis, stride in enumerate(strides))
    bits = functools.reduce(jnp.add, numbers) ^ first
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D)
    bits = ((bits ^ (bits >> 15)) + second) * jnp.uint32(0x846CA68B)
    bits = bits ^ (bits >> 16)
    return jnp.where(bits >= jnp.uint32(round(rate * 2**32)), x / (1 - rate), 0)


class GroupNorm(nn.Module):
    """GroupNorm in float32 with eps 1e-5, as in the papers' code.

    Sums of x and x² per channel first, then one multiply-add with everything folded in: two passes over x, which XLA
    fuses into its neighbours. (flax.linen.GroupNorm's grouped reductions take up to four times as long on a CPU.)
    """

    groups: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float32[Array, "B H W C"]:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        x = x.astype(jnp.float32)

        def group_mean(values: Float[Array, "B H W C"]) -> Float[Array, "B C"]:
            per_channel = jnp.mean(values, axis=(1, 2)).reshape(x.shape[0], self.groups, -1)
            return jnp.repeat(jnp.mean(per_channel, axis=-1), channels // self.groups, axis=1)

        mean = group_mean(x)
        variance = jnp.maximum(group_mean(jnp.square(x)) - jnp.square(mean), 0.0)
        gain = jax.lax.rsqrt(variance + 1e-5) * scale[None]
        return x * gain[:, None, None] + (bias[None] - mean * gain)[:, None, None]
