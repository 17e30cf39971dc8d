"""CLIP's two towers (arXiv 2103.00020): pictures and captions into one space of unit vectors."""

import flax.linen as nn
import jax.numpy as jnp

from unclip_jax.models.layers import LayerNorm, Mask
from unclip_jax.models.transformer import Transformer, last_real


def normalize(x):
    """Rows of unit length; a zero row stays zero."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


class ImageTower(nn.Module):
    """A vision transformer: pictures (B, R, R, 3), already normalised by the dataset's mean and std → (B, dim).

    GLIDE's noise-aware tower (arXiv 2112.10741, section 2.4) takes noised pictures and their timesteps (B,): a learned
    vector for each of the `timesteps` stands where the class token stands otherwise.
    """

    dim: int
    patch: int
    width: int
    depth: int
    heads: int
    timesteps: int  # 0: not noise-aware
    activation: str
    dtype: jnp.dtype
    remat: bool
    mlp_width: int | None = None  # as in Transformer

    @nn.compact
    def __call__(self, images, timesteps=None):
        std = nn.initializers.normal(self.width**-0.5)
        patches = nn.Conv(
            self.width, (self.patch, self.patch), strides=self.patch, use_bias=False, dtype=self.dtype, name="patch"
        )(images)
        x = patches.reshape(images.shape[0], -1, self.width).astype(jnp.float32)
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
    """A causal transformer read at the caption's last token.

    tokens (B, context), length (B,) → embedding (B, dim), states (B, context, width): the last layer, normed.
    """

    dim: int
    vocab_size: int
    context: int
    width: int
    depth: int
    heads: int
    activation: str
    dtype: jnp.dtype
    remat: bool
    mlp_width: int | None = None  # as in Transformer

    @nn.compact
    def __call__(self, tokens, length):
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
    unit_norm: bool  # of the embeddings given out; False: as the projections leave them

    def setup(self):
        self.logit_scale = self.param("logit_scale", lambda _: jnp.log(jnp.float32(self.initial_scale)))

    def __call__(self, images, tokens, length, timesteps=None):
        """→ image embeddings (B, dim), text embeddings (B, dim), both of unit norm, scale of their dot products ()."""
        z_i, z_t = self.image(images, timesteps), self.text(tokens, length)[0]
        return normalize(z_i), normalize(z_t), jnp.exp(self.logit_scale)

    def embed_image(self, images, timesteps=None):
        """Embeddings (B, dim)."""
        return self._given(self.image(images, timesteps))

    def embed_text(self, tokens, length):
        """Embeddings (B, dim) and the text tower's states (B, context, width)."""
        embedding, states = self.text(tokens, length)
        return self._given(embedding), states

    def _given(self, embedding):
        return normalize(embedding) if self.unit_norm else embedding
