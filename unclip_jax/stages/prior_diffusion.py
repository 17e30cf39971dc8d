"""The diffusion prior: caption → CLIP image embedding (arXiv 2204.06125, section 2.2).

x0 = `embedding_scale` · z_i, z_i of unit norm; L = E ‖f(x_t, t, caption, z_t) − x0‖² averaged over elements. Caption
and z_t count as one condition and are dropped together. Sampling draws two embeddings and keeps the one nearer z_t.
"""

import jax
import jax.numpy as jnp

from unclip_jax.models.clip import normalize
from unclip_jax.models.prior import DiffusionPrior
from unclip_jax.stages.base import Stage, diffusion_loss, draw


class PriorDiffusion(Stage):
    """Batches give pictures and captions for CLIP, and the caption again in the prior's own tokens."""

    needs_clip = True

    @property
    def images(self):
        return {"clip_image": self.clip.config.model.image_size}

    @property
    def texts(self):
        own = ("own", self.config.model.context, False)
        return {"tokens": own, "clip_tokens": ("clip", self.clip.config.model.text.context, True)}

    def _model(self) -> DiffusionPrior:
        return DiffusionPrior(**self.config.model, dtype=jnp.dtype(self.config.dtype))

    def init(self, key):
        m = self.config.model
        one = jnp.ones((1,), jnp.int32)
        z = jnp.zeros((1, m.embedding_dim))
        return self._model().init(key, z, one, jnp.zeros((1, m.context), jnp.int32), one, z)["params"]

    def loss(self, params, frozen, batch, key):
        scale = self.config.diffusion.embedding_scale
        z_i = self.clip.embed_images(frozen, batch["clip_image"])
        z_t = self.clip.embed_texts(frozen, batch["clip_tokens"], batch["clip_tokens_length"])
        key_drop, key_loss = jax.random.split(key)
        keep = ~jax.random.bernoulli(key_drop, self.config.diffusion.drop_text, z_i.shape[:1])
        length = jnp.where(keep, batch["tokens_length"], 0)
        text_embedding = jnp.where(keep[:, None], scale * z_t, 0.0)

        def network(x_t, t):
            return self._model().apply({"params": params}, x_t, t, batch["tokens"], length, text_embedding)

        return diffusion_loss(self.config, network, scale * z_i, key_loss)

    def sample(self, params, frozen, conditions, key):
        """Unit embeddings (B, dim) for {"tokens" (B, context), "tokens_length" (B,), "text_embedding" (B, dim) of unit
        norm, "guidance_scale" ()}."""
        del frozen
        scale, draws = self.config.diffusion.embedding_scale, self.config.sampling.draws
        z_t = conditions["text_embedding"]
        tokens, length = conditions["tokens"], conditions["tokens_length"]

        # Rows: every draw conditional, then every draw unconditional.
        tokens = jnp.tile(tokens, (2 * draws, 1))
        length = jnp.concatenate([jnp.tile(length, draws), jnp.zeros(draws * len(length), length.dtype)])
        text = jnp.tile(scale * z_t, (draws, 1))
        text = jnp.concatenate([text, jnp.zeros_like(text)])

        def network(x_t, t):
            return self._model().apply({"params": params}, x_t, t, tokens, length, text)

        drawn = draw(self.config, network, (draws * len(z_t), z_t.shape[-1]), key, conditions["guidance_scale"])
        drawn = normalize(drawn).reshape(draws, *z_t.shape)
        nearest = jnp.argmax(jnp.sum(drawn * z_t[None], axis=-1), axis=0)
        return jnp.take_along_axis(drawn, nearest[None, :, None], axis=0)[0]

    def evaluate(self, params, frozen, batch, key):
        """Mean cosine of drawn embeddings to the true ones, beside three baselines that know less: the text embedding
        itself, the mean of the true embeddings, and embeddings drawn for another row's caption."""
        loss, _ = self.loss(params, frozen, batch, key)
        z_i = self.clip.embed_images(frozen, batch["clip_image"])
        z_t = self.clip.embed_texts(frozen, batch["clip_tokens"], batch["clip_tokens_length"])
        conditions = {name: batch[name] for name in ("tokens", "tokens_length")} | {
            "text_embedding": z_t,
            "guidance_scale": jnp.float32(self.config.sampling.guidance_scale),
        }
        drawn = self.sample(params, frozen, conditions, key)

        def cosine(z):
            return jnp.mean(jnp.sum(z * z_i, axis=-1))

        metrics = {
            "loss": loss,
            "cosine_model": cosine(drawn),
            "cosine_copy_text": cosine(z_t),
            "cosine_mean": cosine(normalize(jnp.mean(z_i, axis=0, keepdims=True))),
            "cosine_shuffled_text": cosine(jnp.roll(drawn, 1, axis=0)),
        }
        return metrics, None
