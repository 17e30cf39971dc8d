"""The diffusion prior (arXiv 2204.06125, section 2.2): a causal transformer that predicts the un-noised CLIP image
embedding from a caption, its CLIP text embedding, the timestep and the noised image embedding."""

import flax.linen as nn
import jax.numpy as jnp

from unclip_jax.models.layers import Dense, LayerNorm, Mask, TimestepMLP
from unclip_jax.models.transformer import Transformer


class DiffusionPrior(nn.Module):
    """Sequence: caption tokens | CLIP text embedding | timestep | noised image embedding | query; read at the query.

    Padded caption positions are hidden from everything; the four last places never are. The caption comes in as tokens,
    for an embedding table of the prior's own, or as the states of CLIP's text tower, for a linear layer (Karlo's form).
    """

    embedding_dim: int
    caption: str  # "own": tokens; "clip": states
    vocab_size: int  # of the own tokens
    context: int
    width: int
    depth: int
    heads: int
    dtype: jnp.dtype
    remat: bool

    @nn.compact
    def __call__(self, x, timesteps, caption, length, text_embedding):
        """The un-noised embedding, float32 (B, embedding_dim).

        x (B, embedding_dim): noised image embedding; text_embedding likewise; timesteps (B,); caption: tokens
        (B, context) or states (B, context, W); length (B,) real ones of them.
        """
        small = nn.initializers.normal(0.01)
        if self.caption == "own":
            table = nn.initializers.normal(0.02)
            words = nn.Embed(self.vocab_size, self.width, embedding_init=table, name="tokens")(caption)
        else:
            words = Dense(self.width, name="caption")(caption)
        query = jnp.broadcast_to(self.param("query", small, (self.width,)), (x.shape[0], self.width))
        conditions = [
            Dense(self.width, name="text_embedding")(text_embedding),
            TimestepMLP(self.width, self.width, name="time")(timesteps),
            Dense(self.width, name="noised_embedding")(x),
            query,
        ]
        h = jnp.concatenate([words, jnp.stack(conditions, axis=1)], axis=1)
        h = h + self.param("positions", small, (self.context + 4, self.width))[None]

        places = jnp.arange(self.context + 4)[None, :]
        mask = Mask(causal=True, keys=(places < length[:, None]) | (places >= self.context))
        h = Transformer(self.depth, self.heads, "gelu", self.dtype, self.remat, name="transformer")(h, mask)
        return Dense(self.embedding_dim, name="out")(LayerNorm(name="norm")(h[:, -1]))
