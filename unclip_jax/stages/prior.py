"""Parts that both priors share: CLIP's embeddings of a batch, and how near to the true ones theirs are."""

import jax.numpy as jnp

from unclip_jax.models.clip import normalize
from unclip_jax.stages.base import MORE_ON_CHIP, Stage


class Prior(Stage):
    """Batches give pictures and captions for CLIP, or its embeddings; `sample` draws embeddings (B, dim)."""

    needs_clip = True
    tpu_options = MORE_ON_CHIP

    @property
    def images(self):
        return {} if self.embedded else {"clip_image": self.clip.config.model.image_size}

    @property
    def vectors(self):
        return {"image_embedding": self.clip.dim, "text_embedding": self.clip.dim} if self.embedded else {}

    def embeddings(self, frozen, batch):
        """CLIP's z_i and z_t of a batch, (B, dim) each."""
        if self.embedded:
            return batch["image_embedding"], batch["text_embedding"]
        z_i = self.clip.embed_images(frozen, batch["clip_image"])
        return z_i, self.clip.embed_texts(frozen, batch["clip_tokens"], batch["clip_tokens_length"])

    def evaluate(self, params, frozen, batch, key):
        """Mean cosine of drawn embeddings to the true ones, beside three baselines that know less: the text embedding
        itself, the mean of the true embeddings, and embeddings drawn for another row's caption."""
        loss, _ = self.loss(params, frozen, batch, key)
        z_i, z_t = self.embeddings(frozen, batch)
        conditions = {name: value for name, value in batch.items() if "tokens" in name} | {
            "text_embedding": z_t,
            "guidance_scale": jnp.float32(self.config.sampling.guidance_scale),
        }
        drawn = self.sample(params, frozen, conditions, key)
        metrics = {
            "loss": loss,
            "cosine_model": mean_cosine(drawn, z_i),
            "cosine_copy_text": mean_cosine(z_t, z_i),
            "cosine_mean": mean_cosine(normalize(jnp.mean(z_i, axis=0, keepdims=True)), z_i),
            "cosine_shuffled_text": mean_cosine(jnp.roll(drawn, 1, axis=0), z_i),
        }
        return metrics, None


def mean_cosine(a, b):
    """Mean cosine of the angles between rows of a and b, (B, dim) or (1, dim) each."""
    return jnp.mean(jnp.sum(normalize(a) * normalize(b), axis=-1))
