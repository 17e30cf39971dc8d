"""The ADM U-Net (arXiv 2105.05233), with GLIDE's text (2112.10741) and unCLIP's CLIP embedding (2204.06125).

A `UNet` takes an embedding, which is added to its timestep's, and a context, to which its attention attends. The
conditioners make both from a caption and a CLIP image embedding. unCLIP's upsamplers are a `UNet` without attention.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Float32, Int

from unclip_jax.arrays import Array, Params
from unclip_jax.models.layers import (
    Conv3x3,
    Dense,
    GroupNorm,
    LayerNorm,
    Mask,
    Projections,
    TimestepMLP,
    attention,
    dropout,
    fan_in_uniform,
    zeros,
)
from unclip_jax.models.transformer import TextTransformer

# A sequence, or the keys and values that each attention projects from it, by the attention's name: see `read_context`.
Context = Float[Array, "B S width"] | dict[str, list[Float[Array, "B S _"]]]


def downsample(x: Float[Array, "B H W C"]) -> Float[Array, "B H//2 W//2 C"]:
    """2×2 average pooling."""
    return 0.25 * nn.pool(x, 0.0, jax.lax.add, (2, 2), (2, 2), "VALID")


def upsample(x: Float[Array, "B H W C"]) -> Float[Array, "B 2*H 2*W C"]:
    """Nearest neighbour, ×2."""
    # Not by jax.image.resize: it gathers, and XLA spreads the layout of a gather on a TPU over the whole network.
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


def same(x: Array) -> Array:
    """No resampling."""
    return x


class ResBlock(nn.Module):
    """Residual block of two convolutions, which may halve or double the picture.

    The timestep's embedding scales and shifts the second norm's output (FiLM), or is added to its input.
    """

    features: int
    groups: int
    dropout: float
    scale_shift: bool
    dtype: DTypeLike
    resample: Callable[[Array], Array] = same

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], emb: Float[Array, "B E"], deterministic: bool
    ) -> Float[Array, "B _ _ {self.features}"]:
        h = nn.silu(GroupNorm(self.groups, name="norm_in")(x)).astype(self.dtype)
        h, x = self.resample(h), self.resample(x)
        h = Conv3x3(self.features, dtype=self.dtype, name="conv_in")(h)

        norm = GroupNorm(self.groups, name="norm_out")
        if self.scale_shift:
            film = Dense(2 * self.features, dtype=self.dtype, name="film")(nn.silu(emb))
            scale, shift = jnp.split(film.astype(jnp.float32)[:, None, None, :], 2, axis=-1)
            h = nn.silu(norm(h) * (1 + scale) + shift)
        else:
            shift = Dense(self.features, dtype=self.dtype, name="shift")(nn.silu(emb))
            h = nn.silu(norm(h + shift[:, None, None, :]))

        if self.dropout and not deterministic:
            h = dropout(h, self.dropout, self.make_rng("dropout"))
        h = Conv3x3(self.features, dtype=self.dtype, **zeros, name="conv_out")(h)

        if x.shape[-1] != self.features:
            x = nn.Conv(self.features, (1, 1), dtype=self.dtype, kernel_init=fan_in_uniform, name="skip")(x)
        return x + h


class AttentionBlock(nn.Module):
    """Self-attention over pixels, which may attend to a context too."""

    heads: int
    groups: int
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        context: Float[Array, "B S width"] | list[Float[Array, "B S C"]] | None,
        context_mask: Bool[Array, "B S"] | None,
    ) -> Float[Array, "B H W C"]:
        """context: a sequence, or the keys and values projected from it; context_mask None: all of it is attended."""
        b, height, width, c = x.shape

        def split(projections: list[Array]) -> list[Array]:
            return [each.reshape(b, -1, self.heads, c // self.heads) for each in projections]

        h = GroupNorm(self.groups, name="norm")(x).reshape(b, height * width, c)
        query, key, value = split(Projections(c, 3, self.dtype, name="qkv")(h))

        # The context's keys and values stand in front of the pixels' own.
        if context is not None:
            if not isinstance(context, list):
                context = Projections(c, 2, self.dtype, name="context_kv")(context)
            context_key, context_value = split(context)
            key = jnp.concatenate([context_key, key], axis=1)
            value = jnp.concatenate([context_value, value], axis=1)
        mask = None
        if context_mask is not None:
            mask = Mask(keys=jnp.pad(context_mask, ((0, 0), (0, height * width)), constant_values=True))

        h = checkpoint_name(attention(query, key, value, mask), "attention").reshape(b, height, width, c)
        return x + Dense(c, dtype=self.dtype, **zeros, name="out")(h)


def read_context(params: Params, conditioning: "Conditioning", dtype: DTypeLike) -> "Conditioning":
    """Replaces the conditioning's context by the keys and values that each attention of the UNet projects from it.

    Every step of sampling reads the same context, so it need be projected only once; the TPU compiler does not move the
    projections out of the loop by itself. params: of the UNet. dtype: in which it multiplies.
    """

    def keys_and_values(kernel: Array, bias: Array) -> list[Array]:
        projections = Projections(kernel.shape[1] // 2, 2, dtype)
        return projections.apply({"params": {"kernel": kernel, "bias": bias}}, conditioning.context)

    read = {name: keys_and_values(**nn.meta.unbox(p["context_kv"])) for name, p in params.items() if "context_kv" in p}
    return conditioning._replace(context=read)


class UNet(nn.Module):
    """A U-Net of ResBlocks, with attention at some levels, over noised pictures and their timesteps.

    Attention has `head_channels` channels per head or, where that is 0, `heads` heads: (down and middle, up).
    """

    channels: int  # of the first level; the others have channels × channel_mult
    channel_mult: tuple[int, ...]
    res_blocks: int  # per level; one more on the way up
    attention: tuple[int, ...]  # downsampling factors of the levels that attend
    middle_attention: bool
    head_channels: int
    heads: tuple[int, int]
    norm_groups: int
    scale_shift: bool  # how the timestep enters; see ResBlock
    resample_blocks: bool  # ResBlocks halve and double; else a strided convolution, and one after doubling
    out_channels: int
    dropout: float
    dtype: DTypeLike
    remat: bool

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        timesteps: Int[Array, " B"],
        emb: Float[Array, "B {4*self.channels}"] | None = None,
        context: Context | None = None,
        context_mask: Bool[Array, "B S"] | None = None,
        deterministic: bool = True,
    ) -> Float32[Array, "B H W {self.out_channels}"]:
        """emb: added to the timestep's embedding. context: attended at every attention, where context_mask is True.

        deterministic: without dropout.
        """
        # Remat keeps the attention's output, which takes far longer to compute again than its inputs.
        res_block = nn.remat(ResBlock, static_argnums=(3,)) if self.remat else ResBlock
        keep = jax.checkpoint_policies.save_only_these_names("attention")
        attention_block = nn.remat(AttentionBlock, policy=keep) if self.remat else AttentionBlock

        time = TimestepMLP(self.channels, 4 * self.channels, name="time")(timesteps)
        emb = time if emb is None else time + emb.astype(jnp.float32)

        def res(h: Array, features: int, name: str, resample: Callable[[Array], Array] = same) -> Array:
            block = res_block(
                features, self.norm_groups, self.dropout, self.scale_shift, self.dtype, resample, name=name
            )
            return block(h, emb, deterministic)

        def resampled(h: Array, name: str, resample: Callable[[Array], Array]) -> Array:
            if self.resample_blocks:
                return res(h, h.shape[-1], name, resample)
            strides = 2 if resample is downsample else 1
            h = h if resample is downsample else resample(h)
            return Conv3x3(h.shape[-1], strides=strides, dtype=self.dtype, name=name)(h)

        def attend(h: Array, name: str, up: bool = False) -> Array:
            heads = h.shape[-1] // self.head_channels if self.head_channels else self.heads[up]
            read = context[name] if isinstance(context, dict) else context
            return attention_block(heads, self.norm_groups, self.dtype, name=name)(h, read, context_mask)

        # Down: every output, the first convolution's too, is kept for the way up.
        widths = [self.channels * mult for mult in self.channel_mult]
        last = len(widths) - 1
        h = Conv3x3(widths[0], dtype=self.dtype, name="conv_in")(x)
        skips = [h]
        for level, width in enumerate(widths):
            for i in range(self.res_blocks):
                h = res(h, width, f"down_{level}_{i}_res")
                if 2**level in self.attention:
                    h = attend(h, f"down_{level}_{i}_attention")
                skips.append(h)
            if level < last:
                h = resampled(h, f"down_{level}_resample", downsample)
                skips.append(h)

        # Middle.
        h = res(h, widths[-1], "middle_0_res")
        if self.middle_attention:
            h = attend(h, "middle_attention")
        h = res(h, widths[-1], "middle_1_res")

        # Up: one block more per level than down, since each takes in one of the kept outputs, the last one first.
        for level, width in reversed(list(enumerate(widths))):
            for i in range(self.res_blocks + 1):
                h = res(jnp.concatenate([h, skips.pop()], axis=-1), width, f"up_{level}_{i}_res")
                if 2**level in self.attention:
                    h = attend(h, f"up_{level}_{i}_attention", up=True)
            if level > 0:
                h = resampled(h, f"up_{level}_resample", upsample)

        h = nn.silu(GroupNorm(self.norm_groups, name="norm_out")(h))
        return Conv3x3(self.out_channels, **zeros, name="conv_out")(h)


class Conditioning(NamedTuple):
    """Conditions of a U-Net besides the noisy picture; computed once per sampling run."""

    emb: Float[Array, "B E"]  # added to the timestep's embedding; E is 4·channels
    context: Context  # attended
    context_mask: Bool[Array, "B S"] | None  # None: all of the context is attended


class TextConditioner(nn.Module):
    """GLIDE's conditioning on captions."""

    text: TextTransformer
    emb_width: int  # 4·channels of the U-Net

    @nn.compact
    def __call__(self, tokens: Int[Array, "B context"], length: Int[Array, " B"]) -> Conditioning:
        """length: tokens of each caption, padding left out; 0 drops the caption."""
        text = self.text(tokens, length)
        return Conditioning(Dense(self.emb_width, name="text_to_emb")(text[:, -1]), text, None)


class Conditioner(nn.Module):
    """unCLIP's conditioning on captions, read by a text path of its own, and on CLIP image embeddings."""

    text: TextTransformer
    emb_width: int
    image_tokens: int
    learned_null: bool  # what a dropped embedding becomes: a learned vector, or zeros
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B context"],
        length: Int[Array, " B"],
        image_embedding: Float[Array, "B d"],
        has_embedding: Bool[Array, " B"],
    ) -> Conditioning:
        """length: as in TextConditioner. has_embedding: False drops the embedding."""
        text = self.text(tokens, length)
        emb = Dense(self.emb_width, name="text_to_emb")(text[:, -1])
        image_emb, image = _image_conditioning(self, image_embedding, has_embedding, text.shape[-1])
        return Conditioning(emb + image_emb, jnp.concatenate([text, image], axis=1), None)


class ClipConditioner(nn.Module):
    """Karlo's conditioning on captions, read by CLIP's text tower, and on CLIP image embeddings.

    The text embedding joins the timestep's; the tower's states are attended up to the caption's end.
    """

    width: int  # of the context
    emb_width: int
    image_tokens: int
    learned_null: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        states: Float[Array, "B context W"],
        length: Int[Array, " B"],
        text_embedding: Float[Array, "B d"],
        image_embedding: Float[Array, "B d"],
        has_embedding: Bool[Array, " B"],
    ) -> Conditioning:
        """states: of CLIP's text tower. has_embedding: False drops the image embedding."""
        text = LayerNorm(name="text_norm")(Dense(self.width, name="text_states")(states))
        emb = Dense(self.emb_width, name="text_to_emb")(text_embedding)
        image_emb, image = _image_conditioning(self, image_embedding, has_embedding, self.width)
        real = jnp.arange(states.shape[1])[None, :] < length[:, None]
        mask = jnp.pad(real, ((0, 0), (0, self.image_tokens)), constant_values=True)
        return Conditioning(emb + image_emb, jnp.concatenate([text, image], axis=1), mask)


def _image_conditioning(
    module: Conditioner | ClipConditioner,
    embedding: Float[Array, "B d"],
    has_embedding: Bool[Array, " B"],
    width: int,
) -> tuple[Float[Array, "B {module.emb_width}"], Float[Array, "B {module.image_tokens} {width}"]]:
    """Projects CLIP image embeddings to an embedding for the timestep's, and to image tokens of `width`."""
    dim = embedding.shape[-1]
    null = module.param("null_embedding", nn.initializers.zeros, (dim,)) if module.learned_null else jnp.zeros(dim)
    # x sqrt(d): elements of order one, as the other inputs of the sum have.
    z = jnp.where(has_embedding[:, None], embedding * dim**0.5, null[None])
    emb = Dense(module.emb_width, name="image_to_emb")(z)
    if not module.image_tokens:
        return emb, jnp.zeros((len(z), 0, width))
    tokens = Dense(module.image_tokens * width, dtype=module.dtype, name="image_to_tokens")(z)
    return emb, tokens.astype(jnp.float32).reshape(-1, module.image_tokens, width)
