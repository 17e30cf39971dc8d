"""CLIP: pictures and captions into one space (arXiv 2103.00020; unCLIP's sizes, 2204.06125, appendix C).

L = (CE(s ẑ_i ẑ_tᵀ) + CE(s ẑ_t ẑ_iᵀ)) / 2 over the whole global batch, s = e^θ learned and at most `max_scale`.
"""

import jax
import jax.numpy as jnp

from unclip_jax.models.clip import CLIP, ImageTower, TextTower
from unclip_jax.stages.base import Stage, to_float


class Clip(Stage):
    """Params {"image", "text", "logit_scale"}. Embeddings have unit norm unless `config.model.unit_norm` is False.

    Where `config.model.image` is None it is a text tower alone, as public weights may be: it is neither trained nor
    embeds pictures, and has no params "image".
    """

    @property
    def images(self):
        return {"image": self.config.model.image_size} if self.config.model.image else {}

    @property
    def texts(self):
        return {"tokens": ("own", self.config.model.text.context, True)}

    @property
    def dim(self) -> int:
        """Of the shared space."""
        return self.config.model.dim

    def _model(self) -> CLIP:
        m, shared = self.config.model, {"dim": self.dim, "dtype": jnp.dtype(self.config.dtype)}
        shared |= {"activation": m.activation, "remat": m.remat}
        return CLIP(
            image=ImageTower(**m.image, **shared) if m.image else None,
            text=TextTower(**m.text, **shared),
            initial_scale=m.initial_scale,
            unit_norm=m.unit_norm,
        )

    def init(self, key):
        batch = {name: jnp.zeros(s.shape, s.dtype) for name, s in self.batch_spec(1).items()}
        length = batch["tokens_length"] + 1
        if not self.config.model.image:
            return self._model().init(key, batch["tokens"], length, method="embed_text")["params"]
        images = self._normalized(to_float(batch["image"]))
        return self._model().init(key, images, batch["tokens"], length, jnp.zeros_like(length))["params"]

    def embed_images(self, params, images):
        """uint8 (B, R, R, 3) → embeddings (B, dim)."""
        return self._model().apply({"params": params}, self._normalized(to_float(images)), method="embed_image")

    def embed_noised(self, params, x_t, timesteps):
        """The noise-aware tower's: x_t (B, R, R, 3), a picture in [-1, 1] diffused to timesteps (B,) → (B, dim)."""
        return self._model().apply({"params": params}, self._normalized(x_t), timesteps, method="embed_image")

    def embed_texts(self, params, tokens, length):
        """Tokens (B, context) with start and end, lengths (B,) → embeddings (B, dim)."""
        return self.read_texts(params, tokens, length)[0]

    def read_texts(self, params, tokens, length):
        """The same, and the text tower's states (B, context, width)."""
        return self._model().apply({"params": params}, tokens, length, method="embed_text")

    def loss(self, params, frozen, batch, key):
        del frozen, key
        images = self._normalized(to_float(batch["image"]))
        z_i, z_t, scale = self._model().apply({"params": params}, images, batch["tokens"], batch["tokens_length"])
        logits = scale * z_i @ z_t.T
        loss = 0.5 * (_diagonal_cross_entropy(logits) + _diagonal_cross_entropy(logits.T))
        return loss, {"accuracy": _retrieval(logits), "logit_scale": scale}

    def evaluate(self, params, frozen, batch, key):
        """`retrieval`: share of pictures whose nearest caption is their own, and of captions likewise, averaged."""
        loss, metrics = self.loss(params, frozen, batch, key)
        return {"loss": loss, "retrieval": metrics["accuracy"]}, None

    def project(self, params):
        ceiling = jnp.log(jnp.float32(self.config.model.max_scale))
        return params | {"logit_scale": jnp.minimum(params["logit_scale"], ceiling)}

    def _normalized(self, images):
        """[-1, 1] → what the towers are trained on: mean and std are of pixels in [0, 1]."""
        m = self.config.model
        mean, std = (jnp.asarray(v, jnp.float32).reshape(1, 1, 1, 3) for v in (m.mean, m.std))
        return ((images + 1) / 2 - mean) / std


def _diagonal_cross_entropy(logits):
    return -jnp.mean(jnp.diagonal(jax.nn.log_softmax(logits, axis=-1)))


def _retrieval(logits):
    own = jnp.arange(logits.shape[0])
    hits = jnp.stack([jnp.argmax(logits, axis=1) == own, jnp.argmax(logits, axis=0) == own])
    return jnp.mean(hits.astype(jnp.float32))
