"""The autoregressive prior (arXiv 2204.06125, section 2.2): the codes of a CLIP image embedding, one after the other.

    places   z_t | dot | c_1 | ... | c_{N-1}          z_t: CLIP text embedding; dot: bucket of its product with z_i
    predict        c_1 | c_2 | ... | c_N

Each place sees those before it and, in every layer, the caption: a text encoder's output, projected to extra keys and
values as in GLIDE (the paper does not say how the caption enters; next to the codes there is no room for it).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.errors import UserError
from unclip_jax.models.layers import Dense, LayerNorm, Mask
from unclip_jax.models.transformer import TextTransformer, Transformer


class ARPrior(nn.Module):
    """Logits of N = num_codes codes, each one of num_buckets.

    All at once where the codes are known, by calling the module; one by one where they are drawn:

        cache, token = start(tokens, length, text_embedding, keep, dot)
        for k in range(num_codes):                          # as a jax.lax.scan, of carry (cache, token)
            logits, cache = step(cache, k, token)           # of c_{k+1}
            token = draw(logits)
    """

    text: TextTransformer
    num_codes: int
    num_buckets: int  # of a code
    num_dot_buckets: int  # of the dot product
    context: int  # rows of the table of positions, at least num_codes + 1
    width: int
    depth: int
    heads: int
    dtype: jnp.dtype
    remat: bool

    def setup(self):
        if self.num_codes + 1 > self.context:
            raise UserError(f"an autoregressive prior of {self.num_codes} codes and context {self.context}: expected a "
                            f"context of at least {self.num_codes + 1}, for the codes and the two tokens before them")
        small = nn.initializers.normal(0.01)
        # One table: the buckets of every code, then those of the dot product.
        rows = self.num_buckets + self.num_dot_buckets
        self.tokens = nn.Embed(rows, self.width, embedding_init=nn.initializers.normal(0.02))
        self.positions = self.param("positions", small, (self.context, self.width))
        self.text_embedding = Dense(self.width)
        self.null_text_embedding = self.param("null_text_embedding", small, (self.width,))
        std = nn.initializers.normal(self.text.width**-0.5)
        self.context_kv = nn.Dense(self.depth * 2 * self.width, dtype=self.dtype, kernel_init=std)
        self.transformer = Transformer(self.depth, self.heads, "gelu", self.dtype, self.remat)
        self.norm = LayerNorm()
        self.out = Dense(self.num_buckets)

    def __call__(self, tokens, length, text_embedding, keep, dot, codes):
        """Logits float32 (B, num_codes, num_buckets); those of code k know the codes before it.

        tokens (B, text.context), length (B,): caption; text_embedding (B, d): z_t; keep (B,) bool: False drops both;
        dot (B,) int32 in [0, num_dot_buckets); codes (B, num_codes) int32 in [0, num_buckets).
        """
        first, caption = self._condition(tokens, length, text_embedding, keep)
        read = jnp.concatenate([(self.num_buckets + dot)[:, None], codes[:, :-1]], axis=1)
        x = jnp.concatenate([first, self.tokens(read)], axis=1) + self.positions[None, : self.num_codes + 1]
        x, _ = self.transformer(x, Mask(causal=True), caption)  # all of the caption is in front
        return self.out(self.norm(x[:, 1:]))

    def start(self, tokens, length, text_embedding, keep, dot):
        """Makes what `step` needs, from arguments as in `__call__`: (cache, first token (B,) int32).

        cache (depth, B, text.context + num_codes + 1, 2, heads, width / heads) of `dtype`: every block's keys and
        values of the caption and of the places read so far, then room for the others.
        """
        first, caption = self._condition(tokens, length, text_embedding, keep)
        _, own = self.transformer(first + self.positions[None, :1], None, caption)
        room = jnp.zeros((*own.shape[:2], self.num_codes, *own.shape[3:]), own.dtype)
        return jnp.concatenate([caption, own, room], axis=2), self.num_buckets + dot

    def step(self, cache, k, token):
        """Logits (B, num_buckets) of code k (0-based; may be traced) and the cache for the next.

        token (B,) int32: code k - 1, or what `start` gave where k = 0.
        """
        x = self.tokens(token)[:, None] + self.positions[k + 1][None, None]
        rows = cache.shape[2]
        filled = rows - self.num_codes + k
        place = jnp.arange(rows + 1)
        read = (place < filled) | (place == rows)  # the last is the token's own
        x, own = self.transformer(x, Mask(keys=read[None]), cache)
        cache = jax.lax.dynamic_update_slice_in_dim(cache, own, filled, axis=2)
        return self.out(self.norm(x[:, 0])), cache

    def _condition(self, tokens, length, text_embedding, keep):
        """The first place (B, 1, width), without its position, and every block's keys and values of the caption."""
        text = self.text(tokens, jnp.where(keep, length, 0))
        caption = self.context_kv(text).reshape(*text.shape[:2], self.depth, 2, self.heads, self.width // self.heads)
        first = jnp.where(keep[:, None], self.text_embedding(text_embedding), self.null_text_embedding[None])
        return first[:, None], jnp.moveaxis(caption, 2, 0)
