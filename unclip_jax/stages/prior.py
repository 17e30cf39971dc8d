"""Parts that both priors share: CLIP's embeddings of a batch, and how near to the true ones theirs are."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Float

from unclip_jax.arrays import Array, Batch, Key, Params
from unclip_jax.models.clip import normalize
from unclip_jax.stages.base import MORE_ON_CHIP, ClipTowers, Scalars, Stage, clip_image
from unclip_jax.stages.conditions import Conditions, captions


class Prior(Stage):
    """Batches give pictures and captions for CLIP, or its embeddings; `sample` draws embeddings (B, dim)."""

    clip: ClipTowers
    needs_clip = True
    tpu_options = MORE_ON_CHIP

    @property
    def images(self) -> dict[str, int]:
        return {} if self.embedded else clip_image(self.clip)

    @property
    def vectors(self) -> dict[str, int]:
        return {"image_embedding": self.clip.dim, "text_embedding": self.clip.dim} if self.embedded else {}

    def embeddings(self, frozen: Params, batch: Batch) -> tuple[Float[Array, "B dim"], Float[Array, "B dim"]]:
        """Reads or computes CLIP's embeddings of a batch: z_i of the pictures, z_t of the captions."""
        if self.embedded:
            return batch["image_embedding"], batch["text_embedding"]
        z_i = self.clip.embed_images(frozen, batch["clip_image"])
        return z_i, self.clip.embed_texts(frozen, batch["clip_tokens"], batch["clip_tokens_length"])

    def sample(
        self, params: Params, frozen: Params, conditions: Conditions, key: Key
    ) -> Float[Array, "B dim"]:
        """Draws CLIP image embeddings for captions, their text embeddings and a guidance scale."""
        raise TypeError(f"{type(self).__name__} draws nothing")

    def draw_examples(
        self, params: Params, frozen: Params, batch: Batch, keys: Key
    ) -> dict[str, Float[Array, "B dim"]]:
        """Draws embeddings for the captions, whose own embeddings are "text"."""
        z_i, z_t = self.embeddings(frozen, batch)
        conditions = Conditions(**captions(batch), text_embedding=z_t, guidance_scale=self.guidance())
        return {"drawn": self.sample(params, frozen, conditions, keys), "text": z_t, "true": z_i}

    def score_examples(self, examples: Mapping[str, Array]) -> Scalars:
        """Measures the mean cosine of drawn embeddings to the true ones, beside three baselines that know less: the
        text embedding itself, the mean of the true embeddings, and embeddings drawn for another row's caption."""
        drawn, z_t, z_i = (jnp.asarray(examples[name]) for name in ("drawn", "text", "true"))
        return {
            "cosine_model": mean_cosine(drawn, z_i),
            "cosine_copy_text": mean_cosine(z_t, z_i),
            "cosine_mean": mean_cosine(normalize(jnp.mean(z_i, axis=0, keepdims=True)), z_i),
            "cosine_shuffled_text": mean_cosine(jnp.roll(drawn, 1, axis=0), z_i),
        }


def mean_cosine(a: Float[Array, "#B dim"], b: Float[Array, "#B dim"]) -> Float[jax.Array, ""]:
    """Averages the cosines between rows of a and of b; one row stands for as many as the other has."""
    return jnp.mean(jnp.sum(normalize(a) * normalize(b), axis=-1))
