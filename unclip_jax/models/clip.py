"""CLIP's two towers (arXiv 2103.00020): pictures and captions into one space of unit vectors."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float, Float32, Int

from unclip_jax.arrays import Array
from unclip_jax.models.layers import LayerNorm, Mask
from unclip_jax.models.transformer import Transformer, last_real


def normalize(x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
    """Scales rows to unit length; a zero row stays zero."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


class ImageTower(nn.Module):
    """A vision transformer over pictures that are already normalised by the dataset's mean and std.

    GLIDE's noise-aware tower (arXiv 2112.10741, section 2.4) takes noised pictures and their timesteps. In place of the
    class token it has a learned vector for each timestep.
    """

    dim: int
    patch: int
    width: int
    depth: int
    heads: int
    timesteps: int  # 0: not noise-aware
    activation: str
    dtype: DTypeLike
    remat: bool
    mlp_width: int | None = None  # as in Transformer

    @nn.compact
    def __call__(
        self, images: Float[Array, "B R R 3"], timesteps: Int[Array, " B"] | None = None
    ) -> Float32[Array, "B {self.dim}"]:
        std = nn.initializers.normal(self.width**-0.5)
        patches = nn.Conv(
            self.width, (self.patch, self.patch), strides=self.patch, use_bias=False, dtype=self.dtype, name="patch"
        )(images)
        x = patches.reshape(images.shape[0], -1, self.width).astype(jnp.float32)

        # The embedding is read at the first place: that of the class token, or of the timestep's vector.
        if self.timesteps:
            token = self.param("timesteps", std, (self.timesteps, self.width))[timesteps]
        else:
            token = jnp.broadcast_to(self.param("class_token", std, (self.width,)), (x.shape[0], self.width))
        x = jnp.concatenate([token[:, None], x], axis=1)
        x = x + self.param("positions", std, (x.shape[1], self.width))[None]

        x = LayerNorm(name="norm_in")(x)
        sizes = self.depth, self.heads, self.activation, self.dtype, self.remat, self.mlp_width
        x = Transformer(*sizes, name="transformer")(x)
        x = LayerNorm(name="norm_out")(x[:, 0])
        return nn.Dense(self.dim, use_bias=False, kernel_init=std, name="projection")(x)


class TextTower(nn.Module):
    """A causal transformer, read at the caption's last token."""

    dim: int
    vocab_size: int
    context: int
    width: int
    depth: int
    heads: int
    activation: str
    dtype: DTypeLike
    remat: bool
    mlp_width: int | None = None  # as in Transformer

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "B {self.context}"], length: Int[Array, " B"]
    ) -> tuple[Float32[Array, "B {self.dim}"], Float32[Array, "B {self.context} {self.width}"]]:
        """Embeddings, and the last layer's states after the norm. length: tokens of each caption, padding left out."""
        x = nn.Embed(self.vocab_size, self.width, embedding_init=nn.initializers.normal(0.02), name="tokens")(tokens)
        x = x + self.param("positions", nn.initializers.normal(0.01), (self.context, self.width))[None]
        # Causality hides the padding from every real token, so padding needs no mask of its own.
        sizes = self.depth, self.heads, self.activation, self.dtype, self.remat, self.mlp_width
        transformer = Transformer(*sizes, name="transformer")
        x = LayerNorm(name="norm")(transformer(x, Mask(causal=True)))

        std = nn.initializers.normal(self.width**-0.5)
        embedding = nn.Dense(self.dim, use_bias=False, kernel_init=std, name="projection")(last_real(x, length))
        return embedding, x


class CLIP(nn.Module):
    """Both towers and the learned log temperature."""

    image: ImageTower | None  # None: a text tower alone
    text: TextTower
    initial_scale: float  # of the dot products, before any training
    unit_norm: bool  # whether `embed_image` and `embed_text` normalise the projections' outputs

    def setup(self) -> None:
        self.logit_scale = self.param("logit_scale", lambda _: jnp.log(jnp.float32(self.initial_scale)))

    def __call__(
        self,
        images: Float[Array, "B R R 3"],
        tokens: Int[Array, "B context"],
        length: Int[Array, " B"],
        timesteps: Int[Array, " B"] | None = None,
    ) -> tuple[Float32[Array, "B dim"], Float32[Array, "B dim"], Float32[Array, ""]]:
        """Image and text embeddings, both of unit norm, and the scale of their dot products."""
        z_i, z_t = self.image(images, timesteps), self.text(tokens, length)[0]
        return normalize(z_i), normalize(z_t), jnp.exp(self.logit_scale)

    def embed_image(
        self, images: Float[Array, "B R R 3"], timesteps: Int[Array, " B"] | None = None
    ) -> Float32[Array, "B dim"]:
        """Embeds pictures."""
        return self._scaled(self.image(images, timesteps))

    def embed_text(
        self, tokens: Int[Array, "B context"], length: Int[Array, " B"]
    ) -> tuple[Float32[Array, "B dim"], Float32[Array, "B context width"]]:
        """Embeds captions; gives the text tower's states too."""
        embedding, states = self.text(tokens, length)
        return self._scaled(embedding), states

    def _scaled(self, embedding: Float[Array, "B dim"]) -> Float[Array, "B dim"]:
        return normalize(embedding) if self.unit_norm else embedding
