"""The autoregressive prior (arXiv 2204.06125, section 2.2): the codes of a CLIP image embedding, one after the other.

    places   z_t | dot | c_1 | ... | c_{N-1}          z_t: CLIP text embedding; dot: bucket of its product with z_i
    predict        c_1 | c_2 | ... | c_N

Each place attends to those before it and, in every layer, to the caption: a text encoder's output, projected to extra
keys and values as in GLIDE. (The paper does not say how the caption enters; its context has no room for one beside the
codes.)
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Float32, Int

from unclip_jax.arrays import Array
from unclip_jax.errors import UserError
from unclip_jax.models.layers import Dense, LayerNorm, Mask
from unclip_jax.models.transformer import TextTransformer, Transformer

Tokens = Int[Array, "B {self.text.context}"]
Cache = Float[Array, "{self.depth} B _ 2 {self.heads} D"]  # as Transformer's memory, of `dtype`


class ARPrior(nn.Module):
    """Logits of N = num_codes codes, each one of num_buckets.

    Calling the module gives the logits of all codes at once, where the codes are known. To draw codes one by one:

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
    dtype: DTypeLike
    remat: bool

    def setup(self) -> None:
        if self.num_codes + 1 > self.context:
            raise UserError(f"an autoregressive prior of {self.num_codes} codes and context {self.context}: expected a "
                            f"context of at least {self.num_codes + 1}, for the codes and the two tokens before them")
        small = nn.initializers.normal(0.01)
        # One table of embeddings: first the buckets that all codes share, then those of the dot product.
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

    def __call__(
        self,
        tokens: Tokens,
        length: Int[Array, " B"],
        text_embedding: Float[Array, "B d"],
        keep: Bool[Array, " B"],
        dot: Int[Array, " B"],
        codes: Int[Array, "B {self.num_codes}"],
    ) -> Float32[Array, "B {self.num_codes} {self.num_buckets}"]:
        """Logits of all codes; those of code k depend on the codes before it.

        tokens, length: caption, and its tokens without padding. text_embedding: z_t. keep: False drops both.
        dot: bucket of the dot product, in [0, num_dot_buckets). codes: in [0, num_buckets).
        """
        first, caption = self._condition(tokens, length, text_embedding, keep)
        read = jnp.concatenate([(self.num_buckets + dot)[:, None], codes[:, :-1]], axis=1)
        x = jnp.concatenate([first, self.tokens(read)], axis=1) + self.positions[None, : self.num_codes + 1]
        x, _ = self.transformer(x, Mask(causal=True), caption)  # the whole caption is in front of x, so x attends to it
        return self.out(self.norm(x[:, 1:]))

    def start(
        self,
        tokens: Tokens,
        length: Int[Array, " B"],
        text_embedding: Float[Array, "B d"],
        keep: Bool[Array, " B"],
        dot: Int[Array, " B"],
    ) -> tuple[Cache, Int[Array, " B"]]:
        """Makes the cache and the first token for `step`, from arguments as in `__call__`.

        The cache has text.context + num_codes + 1 places: the caption's, z_t's, and room for those still to be read.
        """
        first, caption = self._condition(tokens, length, text_embedding, keep)
        _, own = self.transformer(first + self.positions[None, :1], None, caption)
        room = jnp.zeros((*own.shape[:2], self.num_codes, *own.shape[3:]), own.dtype)
        return jnp.concatenate([caption, own, room], axis=2), self.num_buckets + dot

    def step(
        self, cache: Cache, k: int | Int[Array, ""], token: Int[Array, " B"]
    ) -> tuple[Float32[Array, "B {self.num_buckets}"], Cache]:
        """Logits of code k, counted from 0, and the cache for the next one.

        token: code k - 1; for k = 0, the token from `start`.
        """
        x = self.tokens(token)[:, None] + self.positions[k + 1][None, None]
        rows = cache.shape[2]
        filled = rows - self.num_codes + k

        # Attend to the places read so far, and to the token's own, which stands behind the cache.
        place = jnp.arange(rows + 1)
        read = (place < filled) | (place == rows)
        x, own = self.transformer(x, Mask(keys=read[None]), cache)
        cache = jax.lax.dynamic_update_slice_in_dim(cache, own, filled, axis=2)
        return self.out(self.norm(x[:, 0])), cache

    def _condition(
        self, tokens: Tokens, length: Int[Array, " B"], text_embedding: Float[Array, "B d"], keep: Bool[Array, " B"]
    ) -> tuple[Float[Array, "B 1 {self.width}"], Cache]:
        """The first place, without its position, and every block's keys and values of the caption."""
        text = self.text(tokens, jnp.where(keep, length, 0))
        caption = self.context_kv(text).reshape(*text.shape[:2], self.depth, 2, self.heads, self.width // self.heads)
        first = jnp.where(keep[:, None], self.text_embedding(text_embedding), self.null_text_embedding[None])
        return first[:, None], jnp.moveaxis(caption, 2, 0)
