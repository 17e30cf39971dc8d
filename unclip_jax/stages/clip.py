"""CLIP: pictures and captions into one space (arXiv 2103.00020; unCLIP's sizes, 2204.06125, appendix C).

L = (CE(s ẑ_i ẑ_tᵀ) + CE(s ẑ_t ẑ_iᵀ)) / 2 over the whole global batch, s = e^θ learned and at most `max_scale`.

GLIDE's noised CLIP (2112.10741, section 2.4) sees pictures diffused to random timesteps, and is told which.

SAM (2010.01412), as unCLIP trained its CLIP: every `optim.sam_rows` rows of the batch climb a step of their own first,

    ε_r = ρ ∇L_r / ‖∇L_r‖       L_r: the loss of these rows alone, as one replica sees them
    ∇L(w + ε)                   of the replicate batch, its rows r embedded by w + ε_r; this is what w descends
"""

import jax
import jax.numpy as jnp
import optax

from unclip_jax.diffusion.process import q_sample
from unclip_jax.diffusion.schedule import make_schedule
from unclip_jax.models.clip import CLIP, ImageTower, TextTower, normalize
from unclip_jax.models.mesh import by_rows, replicate
from unclip_jax.stages.base import MORE_ON_CHIP, Stage, to_float

NOISE_LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)  # shares of the timesteps at which a noised CLIP is evaluated


class Clip(Stage):
    """Params {"image", "text", "logit_scale"}. Embeddings have unit norm unless `config.model.unit_norm` is False.

    Where `config.model.image` is None it is a text tower alone, as public weights may be: it is neither trained nor
    embeds pictures, and has no params "image". It is a noised CLIP where `config.model.image.timesteps` is not 0.
    """

    tpu_options = MORE_ON_CHIP

    @property
    def images(self):
        return {"image": self.config.model.image_size} if self.config.model.image else {}

    @property
    def texts(self):
        return {"tokens": ("own", self.config.model.text.context, True)}

    @property
    def dim(self) -> int:
        """Dimension of the shared space."""
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
        """Reads tokens as `embed_texts` does → embeddings, and the text tower's states (B, context, width)."""
        return self._model().apply({"params": params}, tokens, length, method="embed_text")

    def similarity_gradient(self, params, x_t, timesteps, text_embedding):
        """∇ of e^θ f(x_t, t) · g(caption) by x_t, row by row: what CLIP guidance follows (2112.10741, section 2.4).

        x_t (B, H, W, 3) in [-1, 1] and beyond; text_embedding (B, dim) of unit norm, this CLIP's.
        """

        def similarity(x_t):
            z_i = normalize(self.embed_noised(params, x_t, timesteps))
            return jnp.exp(params["logit_scale"]) * jnp.sum(z_i * text_embedding)

        return jax.grad(similarity)(x_t)

    def loss(self, params, frozen, batch, key):
        del frozen
        images, steps = to_float(batch["image"]), self.config.model.image.timesteps
        rows = [images, batch["tokens"], batch["tokens_length"]]
        if steps:
            key_t, key_noise = jax.random.split(key)
            timesteps = jax.random.randint(key_t, images.shape[:1], 0, steps)
            rows = [self._noised(images, timesteps, key_noise), *rows[1:], timesteps]
        # Public weights come without the numbers of a training.
        use_sam = "optim" in self.config and self.config.optim.sam_rho
        z_i, z_t, scale = (self._embedded_with_sam if use_sam else self._embedded)(params, rows)
        loss, accuracy = _contrastive(z_i, z_t, scale)
        return loss, {"accuracy": accuracy, "logit_scale": jnp.mean(scale)}

    def _embedded(self, params, rows):
        """Embeds [pictures, tokens, lengths, a noised CLIP's timesteps] → unit embeddings (B, dim) and the scale."""
        images, *rest = rows
        return self._model().apply({"params": params}, self._normalized(images), *rest)

    def _embedded_with_sam(self, params, rows):
        """Embeds as `_embedded` does, each `sam_rows` rows by parameters of their own; scale (B, 1)."""
        o = self.config.optim

        def climb(params, rows):
            grads = jax.grad(lambda w: _contrastive(*self._embedded(w, rows))[0])(jax.lax.stop_gradient(params))
            step = o.sam_rho / (optax.tree.norm(grads) + 1e-12)
            return self._embedded(jax.tree.map(lambda w, g: w + step * g, params, grads), rows)

        groups = jax.tree.map(lambda v: v.reshape(-1, o.sam_rows, *v.shape[1:]), rows)
        z_i, z_t, scale = by_rows(jax.vmap(climb, in_axes=(None, 0)), params, groups)
        z_i, z_t = (z.reshape(-1, self.dim) for z in (z_i, z_t))
        return z_i, z_t, jnp.repeat(scale, o.sam_rows)[:, None]

    def _noised(self, images, timesteps, key):
        """q(x_t | x_0) of the diffusion model that this CLIP is to guide."""
        schedule = make_schedule(self.config.model.noise_schedule, self.config.model.image.timesteps)
        return q_sample(schedule, images, timesteps, jax.random.normal(key, images.shape))

    def evaluate(self, params, frozen, batch, key):
        """`retrieval`: share of pictures whose nearest caption is their own, and of captions likewise, averaged. Of a
        noised CLIP also `retrieval_t…` and `loss_t…` of the batch diffused to each of NOISE_LEVELS."""
        del frozen
        images, caption = to_float(batch["image"]), (batch["tokens"], batch["tokens_length"])
        steps = self.config.model.image.timesteps
        if not steps:
            loss, retrieval = _contrastive(*self._embedded(params, [images, *caption]))
            return {"loss": loss, "retrieval": retrieval}, None
        found = {}
        for level in NOISE_LEVELS:
            t = round(level * (steps - 1))
            timesteps = jnp.full(len(images), t)
            rows = [self._noised(images, timesteps, jax.random.fold_in(key, t)), *caption, timesteps]
            found[f"loss_t{t}"], found[f"retrieval_t{t}"] = _contrastive(*self._embedded(params, rows))
        loss, _ = self.loss(params, {}, batch, key)
        return {"loss": loss, "retrieval": found["retrieval_t0"]} | found, None

    def project(self, params):
        ceiling = jnp.log(jnp.float32(self.config.model.max_scale))
        return params | {"logit_scale": jnp.minimum(params["logit_scale"], ceiling)}

    def _normalized(self, images):
        """[-1, 1] → what the towers are trained on: mean and std are of pixels in [0, 1]."""
        m = self.config.model
        mean, std = (jnp.asarray(v, jnp.float32).reshape(1, 1, 1, 3) for v in (m.mean, m.std))
        return ((images + 1) / 2 - mean) / std


def _contrastive(z_i, z_t, scale):
    """The loss, and the share of rows that find their own: picture to caption and caption to picture, averaged.

    z_i, z_t (B, dim) of unit norm; scale () or, of each row, (B, 1).
    """
    # Each device compares its own rows to all others, which come to it.
    both = [scale * z_i @ replicate(z_t).T, scale * z_t @ replicate(z_i).T]
    pairs = jnp.eye(len(z_i), dtype=bool)
    own = [jnp.sum(jnp.where(pairs, logits, 0.0), axis=1) for logits in both]
    loss = 0.5 * sum(jnp.mean(jax.nn.logsumexp(a, axis=1) - b) for a, b in zip(both, own, strict=True))
    hits = jnp.stack([jnp.argmax(logits, axis=1) == jnp.arange(len(z_i)) for logits in both])
    return loss, jnp.mean(hits.astype(jnp.float32))
