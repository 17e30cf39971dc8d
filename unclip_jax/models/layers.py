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

from unclip_jax.models.mesh import compute_capability, platform
from unclip_jax.models.tpu_attention import supported, tpu_attention

# Uniform in +-1/sqrt(fan_in): what the papers' code leaves its convolutions and linear layers at.
fan_in_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

Dense = functools.partial(nn.Dense, kernel_init=fan_in_uniform)
Conv3x3 = functools.partial(nn.Conv, kernel_size=(3, 3), padding=1, kernel_init=fan_in_uniform)
LayerNorm = functools.partial(nn.LayerNorm, epsilon=1e-5, dtype=jnp.float32)  # of float32 input, as the papers' code
zeros = {"kernel_init": nn.initializers.zeros, "bias_init": nn.initializers.zeros}


def timestep_embedding(timesteps, width: int):
    """Sinusoids [cos(t f), sin(t f)], f_k = 10000^(-k / (width / 2)): (B,) integers → (B, width) float32."""
    half = width // 2
    frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimestepMLP(nn.Module):
    """Timesteps (B,) → (B, out) float32: sinusoid of `width`, linear, SiLU, linear."""

    width: int
    out: int

    @nn.compact
    def __call__(self, timesteps):
        x = Dense(self.out, name="in")(timestep_embedding(timesteps, self.width))
        return Dense(self.out, name="out")(nn.silu(x))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mask:
    """Says which of S keys each of T queries attends to: those that both fields allow.

    They are kept apart because cuDNN's kernel knows causality by itself, and skips what it hides.
    """

    causal: bool = field(default=False, metadata={"static": True})  # query i attends to keys 0 ... i + S - T
    keys: jax.Array | None = None  # bool (B or 1, S): True where attended

    def dense(self, length: int, keys: int) -> jax.Array | None:
        """Bool (B or 1, 1, T or 1, S) for T = `length` queries and S = `keys`; None where all is attended."""
        parts = [jnp.tril(jnp.ones((1, 1, length, keys), bool), keys - length)] if self.causal else []
        parts += [] if self.keys is None else [self.keys[:, None, None]]
        return functools.reduce(jnp.logical_and, parts) if parts else None


def attention(query, key, value, mask: Mask | None = None):
    """Scaled dot-product attention, softmax in float32.

    query (B, T, H, D), key and value (B, S, H, D); mask None: every query attends to every key.

    Inside of `jit_on_mesh`, which tells the devices, bfloat16 goes to a kernel that never writes the matrix of weights
    to memory: on a TPU our own, on an NVIDIA GPU from Ampere on cuDNN's.
    """
    mask = mask or Mask()
    if platform() == "tpu" and supported(query, key):
        return tpu_attention(query, key, value, mask.dense(query.shape[1], key.shape[1]))
    if _cudnn_takes(query):
        return _cudnn_attention(query, key, value, mask)
    dense = mask.dense(query.shape[1], key.shape[1])
    return plain_attention(*(x.swapaxes(1, 2) for x in (query, key, value)), dense).swapaxes(1, 2)


def _cudnn_takes(query) -> bool:
    length, width = query.shape[1], query.shape[-1]
    fits = query.dtype == jnp.bfloat16 and width % 8 == 0 and width <= 128
    return compute_capability() >= 8 and fits and length > 1  # one query by itself is no work for a kernel


def _cudnn_attention(query, key, value, mask: Mask):
    """cuDNN's. JAX refuses odd lengths where there is a gradient, so those get one place more, which is hidden."""
    rows, length, keys = *query.shape[:2], key.shape[1]
    padded = [jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (query, key, value)]
    if mask.keys is None and mask.causal and length == keys:
        options = {"is_causal": True}  # its causality starts at the first key, and hides the last
    elif mask.keys is None and not mask.causal:
        options = {"key_value_seq_lengths": jnp.full((rows,), keys, jnp.int32)} if keys % 2 else {}
    else:
        dense = jnp.broadcast_to(mask.dense(length, keys), (rows, 1, length, keys))
        options = {"mask": jnp.pad(dense, ((0, 0), (0, 0), (0, length % 2), (0, keys % 2)))}
    return jax.nn.dot_product_attention(*padded, implementation="cudnn", **options)[:, :length]


@jax.custom_vjp
def plain_attention(query, key, value, mask):
    """`attention` with heads in front of places, (B, H, T, D), and a dense mask, by XLA alone.

    Differentiated by hand: dS = P ∘ (dP - rowsum(dO ∘ O)) / √D. JAX's own took a CPU three times as long.
    """
    return _plain_forward(query, key, value, mask)[0]


def _plain_forward(query, key, value, mask):
    logits = _product("bhtd,bhsd->bhts", query, key) * query.shape[-1] ** -0.5
    if mask is not None:
        logits = jnp.where(mask, logits, -0.7 * jnp.finfo(jnp.float32).max)
    weights = jax.nn.softmax(logits).astype(query.dtype)
    out = _product("bhts,bhsd->bhtd", weights, value).astype(query.dtype)
    return out, (query, key, value, mask, weights, out)


def _plain_backward(kept, gradient):
    query, key, value, mask, weights, out = kept
    of_weights = _product("bhtd,bhsd->bhts", gradient, value)
    mean = jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    of_logits = weights.astype(jnp.float32) * (of_weights - mean) * query.shape[-1] ** -0.5
    if mask is not None:
        of_logits = jnp.where(mask, of_logits, 0.0)
    of_logits = of_logits.astype(query.dtype)
    grads = (
        _product("bhts,bhsd->bhtd", of_logits, key),
        _product("bhts,bhtd->bhsd", of_logits, query),
        _product("bhts,bhtd->bhsd", weights, gradient),
    )
    return *(grad.astype(query.dtype) for grad in grads), None


plain_attention.defvjp(_plain_forward, _plain_backward)


def _product(spec: str, a, b):
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


class Projections(nn.Module):
    """x (..., C) → so many (..., features), by one matrix side by side; each multiplied apart, in the place it is
    needed in: to cut a product into parts afterwards is to copy it."""

    features: int
    parts: int
    dtype: jnp.dtype
    kernel_init: nn.initializers.Initializer = fan_in_uniform

    @nn.compact
    def __call__(self, x):
        total = self.parts * self.features
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], total))
        bias = self.param("bias", nn.initializers.zeros, (total,))
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        split = (jnp.split(value, self.parts, axis=-1) for value in (kernel, bias))
        return [_add_bias(x @ k, b) for k, b in zip(*split, strict=True)]


@jax.custom_vjp
def _add_bias(x, bias):
    """x (..., C) + bias (C,), whose gradient is summed in float32. JAX sums in bfloat16, which takes a TPU longer."""
    bias = bias.reshape((1,) * (x.ndim - 1) + bias.shape)
    return (x.astype(jnp.float32) + bias).astype(x.dtype)


def _add_bias_backward(_, gradient):
    rows = tuple(range(gradient.ndim - 1))
    if platform() != "tpu" or gradient.dtype != jnp.bfloat16:
        return gradient, jnp.sum(gradient.astype(jnp.float32), axis=rows)
    # Behind an attention's kernel there is nothing to fuse a sum into; the matrix unit takes a third of its time. XLA
    # would make a plain sum again of a product with a single row.
    ones = jnp.ones((8, *gradient.shape[:-1]), gradient.dtype)
    contracted = tuple(axis + 1 for axis in rows), rows
    return gradient, jax.lax.dot_general(ones, gradient, (contracted, ((), ())), preferred_element_type=jnp.float32)[0]


_add_bias.defvjp(lambda x, bias: (_add_bias(x, bias), None), _add_bias_backward)


def dropout(x, rate: float, key):
    """x with `rate` of its elements zeroed and the others scaled up; the same elements on every mesh.

    The random bits are hashes of the elements' numbers ("lowbias32", with the key mixed in), as good as dropout
    needs. Threefry, which jax.random draws with, took an eighth of an upsampler's training step on TPU.
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
    """GroupNorm of x (B, H, W, C) of any type, computed and returned in float32, eps 1e-5 as in the papers' code.

    Sums of x and x² per channel first, then one multiply-add with everything folded in: two passes over x, which XLA
    fuses into its neighbours. (flax.linen.GroupNorm's grouped reductions take up to four times as long on a CPU.)
    """

    groups: int

    @nn.compact
    def __call__(self, x):
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        x = x.astype(jnp.float32)

        def group_mean(values):
            per_channel = jnp.mean(values, axis=(1, 2)).reshape(x.shape[0], self.groups, -1)
            return jnp.repeat(jnp.mean(per_channel, axis=-1), channels // self.groups, axis=1)

        mean = group_mean(x)
        variance = jnp.maximum(group_mean(jnp.square(x)) - jnp.square(mean), 0.0)
        gain = jax.lax.rsqrt(variance + 1e-5) * scale[None]
        return x * gain[:, None, None] + (bias[None] - mean * gain)[:, None, None]
