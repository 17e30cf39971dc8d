"""The diffusion prior (arXiv 2204.06125, section 2.2).

A causal transformer predicts the un-noised CLIP image embedding from a caption, its CLIP text embedding, the timestep
and the noised image embedding.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float, Float32, Int

from unclip_jax.arrays import Array
from unclip_jax.models.layers import Dense, LayerNorm, Mask, TimestepMLP
from unclip_jax.models.transformer import Transformer


class DiffusionPrior(nn.Module):
    """Sequence: caption tokens | CLIP text embedding | timestep | noised image embedding | query; read at the query.

    No place attends to the caption's padding. The caption enters as tokens, through the prior's own embedding table, or
    as the states of CLIP's text tower, through a linear layer (Karlo's form).
    """

    embedding_dim: int
    caption: str  # "own": tokens; "clip": states
    vocab_size: int  # of the own tokens
    context: int
    width: int
    depth: int
    heads: int
    dtype: DTypeLike
    remat: bool

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B {self.embedding_dim}"],
        timesteps: Int[Array, " B"],
        caption: Int[Array, "B {self.context}"] | Float[Array, "B {self.context} W"],
        length: Int[Array, " B"],
        text_embedding: Float[Array, "B d"],
    ) -> Float32[Array, "B {self.embedding_dim}"]:
        """Predicts the un-noised embedding from the noised one, x.

        caption: tokens or states, see `caption` above. length: tokens of each caption, padding left out.
        """
        small = nn.initializers.normal(0.01)

        # The caption's places, then the four others.
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

        # Padding is hidden: places from each caption's end up to the four last ones.
        places = jnp.arange(self.context + 4)[None, :]
        mask = Mask(causal=True, keys=(places < length[:, None]) | (places >= self.context))
        h = Transformer(self.depth, self.heads, "gelu", self.dtype, self.remat, name="transformer")(h, mask)
        return Dense(self.embedding_dim, name="out")(LayerNorm(name="norm")(h[:, -1]))
