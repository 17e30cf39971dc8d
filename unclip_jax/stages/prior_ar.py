"""The autoregressive prior: caption → the codes of a CLIP image embedding, one by one (arXiv 2204.06125, section 2.2).

L = mean over the codes of -log p(c_k | c_1 … c_{k-1}, dot, caption, z_t). The caption and z_t are dropped together;
dot, the quantised z_i · z_t, never is. Sampling takes a dot from the top half of those in training, and each code from
the logits l_null + s (l_caption - l_null).

Parameters: the network's, and "fixed", which `prepare` finds in training embeddings and nothing trains (see codes.py).
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int
from ml_collections import ConfigDict

from unclip_jax.arrays import Array, Batch, Key, Params
from unclip_jax.errors import UserError
from unclip_jax.keys import draw_rows, fold_in, split
from unclip_jax.models.clip import normalize
from unclip_jax.models.prior_ar import ARPrior
from unclip_jax.models.transformer import TextTransformer
from unclip_jax.stages import codes
from unclip_jax.stages.base import Metrics, Scalars, trained
from unclip_jax.stages.conditions import Conditions
from unclip_jax.stages.prior import Prior, mean_cosine
from unclip_jax.training.sharding import to_host


class PriorAR(Prior):
    """Batches as the diffusion prior's: the caption in the prior's own tokens and in CLIP's, and CLIP's picture."""

    @property
    def texts(self) -> dict[str, tuple[str, int, bool]]:
        own = {"tokens": ("own", self.config.model.text.context, False)}
        return own if self.embedded else own | {"clip_tokens": ("clip", self.clip.config.model.text.context, True)}

    def _model(self) -> ARPrior:
        m, dtype = self.config.model, jnp.dtype(self.config.dtype)
        return ARPrior(
            text=TextTransformer(**m.text, dtype=dtype, remat=m.remat),
            num_codes=m.num_codes,
            num_buckets=m.num_buckets,
            num_dot_buckets=m.num_dot_buckets,
            context=m.context,
            width=m.width,
            depth=m.depth,
            heads=m.heads,
            dtype=dtype,
            remat=m.remat,
        )

    def init(self, key: Key) -> Params:
        _check(self.config)
        m = self.config.model
        one, keep = jnp.ones((1,), jnp.int32), jnp.ones((1,), bool)
        caption, z, own = (jnp.zeros((1, n), jnp.int32) for n in (m.text.context, m.embedding_dim, m.num_codes))
        params = self._model().init(key, caption, one, z.astype(jnp.float32), keep, one, own)["params"]
        return params | {"fixed": codes.unfitted(m.embedding_dim, m.num_codes)}

    def prepare(self, params: Params, frozen: Params, batches: Iterator[Batch]) -> tuple[Params, Scalars]:
        """Fits components and buckets to `config.prior.batches` batches; reports how well codes keep embeddings."""
        m, p = self.config.model, self.config.prior
        embed = jax.jit(self.embeddings)
        pairs = [jax.tree.map(to_host, embed(frozen, batch)) for batch in islice(batches, p.batches)]
        z_i, z_t = (np.concatenate(part) for part in zip(*pairs, strict=True))
        fixed = codes.fit(z_i, np.sum(z_i * z_t, axis=-1), m.num_codes, p.outside)
        return params | {"fixed": fixed}, jax.jit(self.roundtrip)(fixed, z_i)

    def roundtrip(self, fixed: codes.Statistics, z: Float[Array, "B dim"]) -> Scalars:
        """Encodes and decodes embeddings; measures the mean cosine to them, and the share of variance that is kept."""
        back = codes.decode(fixed, codes.encode(fixed, z, self.config.model.num_buckets), self.config.model.num_buckets)
        spread = jnp.sum((z - jnp.mean(z, axis=0, keepdims=True)) ** 2)
        return {"roundtrip_cosine": mean_cosine(back, z), "roundtrip_variance": 1 - jnp.sum((back - z) ** 2) / spread}

    def loss(
        self, params: Params, frozen: Params, batch: Batch, key: Key, train: bool = True
    ) -> tuple[Float[Array, ""], Metrics]:
        network, fixed = _parts(params)
        m = self.config.model
        z_i, z_t = self.embeddings(frozen, batch)
        keep = ~jax.random.bernoulli(key, self.config.prior.drop_text if train else 0.0, z_i.shape[:1])
        dot = codes.encode_dot(fixed, jnp.sum(z_i * z_t, axis=-1), m.num_dot_buckets)
        target = codes.encode(fixed, z_i, m.num_buckets)
        given = batch["tokens"], batch["tokens_length"], z_t, keep, dot
        logits = self._model().apply({"params": network}, *given, target)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, target)), {}

    def sample(
        self, params: Params, frozen: Params, conditions: Conditions, key: Key
    ) -> Float[Array, "B dim"]:
        """Draws embeddings code by code, at the guidance scale and temperature."""
        drawn = codes.decode(_parts(params)[1], self.draw_codes(params, conditions, key), self.config.model.num_buckets)
        return normalize(drawn) if self.clip.config.model.unit_norm else drawn

    def draw_codes(self, params: Params, conditions: Conditions, key: Key) -> Int[Array, "B codes"]:
        """Draws the codes of `sample`'s embeddings."""
        network, fixed = _parts(params)
        m, s = self.config.model, self.config.sampling
        rows = len(conditions.text_embedding)
        key_dot, key_codes = split(key)
        dot = codes.encode_dot(fixed, codes.draw_dot(fixed, key_dot, rows, s.dot_percentile), m.num_dot_buckets)
        # Rows: all conditional, then, if guided, all unconditional.
        times = conditions.branches
        caption = conditions.tokens, conditions.tokens_length, conditions.text_embedding
        repeated = (jnp.concatenate([array] * times) for array in caption)
        given = *repeated, jnp.arange(times * rows) < rows, jnp.tile(dot, times)

        def apply(*arguments: Any, method: str) -> Any:
            return self._model().apply({"params": network}, *arguments, method=method)

        def step(carry: tuple, k: jax.Array) -> tuple[tuple, jax.Array]:
            cache, token = carry
            logits, cache = apply(cache, k, token, method="step")
            guided = logits
            if conditions.guidance_scale is not None:
                conditional, null = jnp.split(logits, 2)
                guided = null + conditions.guidance_scale * (conditional - null)
            # The largest logit with Gumbel noise is a draw from softmax(logits / temperature); 0 takes the likeliest.
            noise = draw_rows(jax.random.gumbel, fold_in(key_codes, k), guided.shape)
            code = jnp.argmax(guided + s.temperature * noise, axis=-1).astype(jnp.int32)
            return (cache, jnp.tile(code, times)), code

        _, drawn = jax.lax.scan(step, apply(*given, method="start"), jnp.arange(m.num_codes))
        return drawn.T

    def evaluate(self, params: Params, frozen: Params, batch: Batch, key: Key) -> Scalars:
        """Measures the loss, and `roundtrip_cosine`, which the codes of the true embeddings reach."""
        z_i, _ = self.embeddings(frozen, batch)
        reached = self.roundtrip(_parts(params)[1], z_i)["roundtrip_cosine"]
        return {**super().evaluate(params, frozen, batch, key), "roundtrip_cosine": reached}


def _parts(params: Params) -> tuple[Params, codes.Statistics]:
    """The network's parameters, and the statistics, which no gradient reaches."""
    return trained(params), jax.lax.stop_gradient(params["fixed"])


def _check(config: ConfigDict) -> None:
    for section, name, low, high in (
        ("model", "num_codes", 1, config.model.embedding_dim),
        ("prior", "batches", 1, float("inf")),
        ("prior", "outside", 0, 0.4),
        ("prior", "drop_text", 0, 1),
        ("sampling", "temperature", 0, float("inf")),
        ("sampling", "dot_percentile", 0, 100),
    ):
        value = config[section][name]
        if not low <= value <= high:
            raise UserError(f"{section}.{name} is {value}: expected at least {low} and at most {high}")
