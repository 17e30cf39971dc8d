"""CLIP: pictures and captions into one space (arXiv 2103.00020; unCLIP's sizes, 2204.06125, appendix C).

L = (CE(s ẑ_i ẑ_tᵀ) + CE(s ẑ_t ẑ_iᵀ)) / 2 over the whole global batch, s = e^θ learned and at most `max_scale`.

GLIDE's noised CLIP (2112.10741, section 2.4) sees pictures diffused to random timesteps, and is told which.

SAM (2010.01412), as unCLIP trained its CLIP: every `optim.sam_rows` rows of the batch climb a step of their own first,

    ε_r = ρ ∇L_r / ‖∇L_r‖       L_r: the loss of these rows alone, as one replica sees them
    ∇L(w + ε)                   of the replicate batch, its rows r embedded by w + ε_r; this is what w descends
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int, UInt8
from ml_collections import ConfigDict

from unclip_jax.arrays import Array, Batch, Key, Params
from unclip_jax.diffusion.process import q_sample
from unclip_jax.diffusion.schedule import make_schedule
from unclip_jax.models.clip import CLIP, ImageTower, TextTower, normalize
from unclip_jax.models.mesh import by_rows, full_products, replicate
from unclip_jax.stages.base import MORE_ON_CHIP, Metrics, Scalars, Stage, to_float

NOISE_LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)  # shares of the timesteps at which a noised CLIP is evaluated


class Clip(Stage):
    """Params {"image", "text", "logit_scale"}. Embeddings have unit norm unless `config.model.unit_norm` is False.

    Where `config.model.image` is None it is a text tower alone, as public weights may be: it is neither trained nor
    embeds pictures, and has no params "image". It is a noised CLIP where `config.model.image.timesteps` is not 0.
    """

    tpu_options = MORE_ON_CHIP
    adapts = ("model.image.timesteps", "model.noise_schedule")

    @property
    def images(self) -> dict[str, int]:
        return {"image": self.config.model.image_size} if self.config.model.image else {}

    @property
    def texts(self) -> dict[str, tuple[str, int, bool]]:
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

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        # Other stages run this model in programs of their own dtype.
        with full_products(self.config.dtype):
            return self._model().apply(*arguments, **options)

    def init(self, key: Key) -> Params:
        batch = {name: jnp.zeros(s.shape, s.dtype) for name, s in self.batch_spec(1).items()}
        length = batch["tokens_length"] + 1
        if not self.config.model.image:
            return self._model().init(key, batch["tokens"], length, method="embed_text")["params"]
        images = self._normalized(to_float(batch["image"]))
        return self._model().init(key, images, batch["tokens"], length, jnp.zeros_like(length))["params"]

    def adapt_params(self, params: Params, config: ConfigDict) -> Params:
        """Makes a noised CLIP of one that saw clean pictures: its class token at every timestep."""
        steps = self.config.model.image.timesteps
        if not steps or config.model.image.timesteps:
            return params
        image = dict(params["image"])
        token = image.pop("class_token")
        return params | {"image": image | {"timesteps": np.repeat(token[None], steps, axis=0)}}

    def embed_images(self, params: Params, images: UInt8[Array, "B R R 3"]) -> Float[Array, "B dim"]:
        """Embeds pictures; of unit norm where `config.model.unit_norm` says so."""
        return self._apply({"params": params}, self._normalized(to_float(images)), method="embed_image")

    def embed_noised(
        self, params: Params, x_t: Float[Array, "B R R 3"], timesteps: Int[Array, " B"]
    ) -> Float[Array, "B dim"]:
        """Embeds pictures in [-1, 1] that are diffused to timesteps, by the noise-aware tower."""
        return self._apply({"params": params}, self._normalized(x_t), timesteps, method="embed_image")

    def embed_texts(
        self, params: Params, tokens: Int[Array, "B context"], length: Int[Array, " B"]
    ) -> Float[Array, "B dim"]:
        """Embeds captions that have start and end tokens."""
        return self.embed_texts_with_states(params, tokens, length)[0]

    def embed_texts_with_states(
        self, params: Params, tokens: Int[Array, "B context"], length: Int[Array, " B"]
    ) -> tuple[Float[Array, "B dim"], Float[Array, "B context width"]]:
        """Embeds captions; gives the text tower's last states too."""
        return self._apply({"params": params}, tokens, length, method="embed_text")

    def similarity_gradient(
        self,
        params: Params,
        x_t: Float[Array, "B R R 3"],
        timesteps: Int[Array, " B"],
        text_embedding: Float[Array, "B dim"],
    ) -> Float[Array, "B R R 3"]:
        """Computes ∇ of e^θ f(x_t, t) · g(caption) by x_t, row by row, for CLIP guidance (2112.10741, section 2.4).

        text_embedding: this CLIP's, of unit norm.
        """

        def similarity(x_t: Array) -> Array:
            z_i = normalize(self.embed_noised(params, x_t, timesteps))
            return jnp.exp(params["logit_scale"]) * jnp.sum(z_i * text_embedding)

        return jax.grad(similarity)(x_t)

    def loss(
        self, params: Params, frozen: Params, batch: Batch, key: Key, train: bool = True
    ) -> tuple[Float[Array, ""], Metrics]:
        return self.contrast(*self.embed_pairs(params, frozen, batch, key, train))

    def embed_pairs(
        self, params: Params, frozen: Params, batch: Batch, key: Key, train: bool = True
    ) -> tuple[Float[Array, "B dim"], Float[Array, "B dim"], Float[Array, "B 1"]]:
        """Embeds pictures and captions for `contrast`, to unit norm, with each row's scale."""
        del frozen
        images, steps = to_float(batch["image"]), self.config.model.image.timesteps
        rows = [images, batch["tokens"], batch["tokens_length"]]
        if steps:
            key_t, key_noise = jax.random.split(key)
            timesteps = jax.random.randint(key_t, images.shape[:1], 0, steps)
            rows = [self._noised(images, timesteps, key_noise), *rows[1:], timesteps]
        # Public weights come without the numbers of a training.
        use_sam = train and "optim" in self.config and self.config.optim.sam_rho
        z_i, z_t, scale = (self._embedded_with_sam if use_sam else self._embedded)(params, rows)
        return z_i, z_t, jnp.broadcast_to(scale, (len(z_i), 1))

    def contrast(
        self, z_i: Float[Array, "B dim"], z_t: Float[Array, "B dim"], scale: Float[Array, "B 1"]
    ) -> tuple[Float[Array, ""], Metrics]:
        """Computes loss and metrics of all pairs of a batch, which microbatches may have embedded."""
        loss, accuracy = _contrastive(z_i, z_t, scale)
        return loss, {"accuracy": accuracy, "logit_scale": jnp.mean(scale)}

    def _embedded(self, params: Params, rows: Sequence[Array]) -> tuple[Array, Array, Array]:
        """Embeds [pictures, tokens, lengths, a noised CLIP's timesteps] → unit embeddings (B, dim) and the scale."""
        images, *rest = rows
        return self._apply({"params": params}, self._normalized(images), *rest)

    def _embedded_with_sam(self, params: Params, rows: Sequence[Array]) -> tuple[Array, Array, Array]:
        """Does what `_embedded` does, each `sam_rows` rows by parameters of their own; scale (B, 1).

        A device climbs for one group of rows after another, and holds the parameters of one at a time.
        """
        o = self.config.optim

        def climb(params: Params, rows: Sequence[Array]) -> tuple[Array, ...]:
            grads = jax.grad(lambda w: _contrastive(*self._embedded(w, rows))[0])(jax.lax.stop_gradient(params))
            step = o.sam_rho / (optax.tree.norm(grads) + 1e-12)
            return self._embedded(jax.tree.map(lambda w, g: w + step * g, params, grads), rows)

        def climb_each(params: Params, groups: Sequence[Array]) -> tuple[Array, ...]:
            if len(groups[0]) == 1:
                return jax.tree.map(lambda v: v[None], climb(params, [v[0] for v in groups]))
            # Climbed again on the way back: the loop would keep the parameters of every group.
            return jax.lax.map(lambda rows: jax.checkpoint(climb)(params, rows), groups)

        groups = jax.tree.map(lambda v: v.reshape(-1, o.sam_rows, *v.shape[1:]), rows)
        z_i, z_t, scale = by_rows(climb_each, params, groups)
        z_i, z_t = (z.reshape(-1, self.dim) for z in (z_i, z_t))
        return z_i, z_t, jnp.repeat(scale, o.sam_rows)[:, None]

    def _noised(self, images: Array, timesteps: Array, key: Key) -> Array:
        """Draws from q(x_t | x_0) of the diffusion model that this CLIP is to guide."""
        schedule = make_schedule(self.config.model.noise_schedule, self.config.model.image.timesteps)
        return q_sample(schedule, images, timesteps, jax.random.normal(key, images.shape))

    def evaluate(self, params: Params, frozen: Params, batch: Batch, key: Key) -> Scalars:
        """Measures `retrieval`: the share of pictures whose nearest caption is their own, averaged with the share of
        captions whose nearest picture is. A noised CLIP has `retrieval_t…` and `loss_t…` at NOISE_LEVELS too."""
        del frozen
        images, caption = to_float(batch["image"]), (batch["tokens"], batch["tokens_length"])
        steps = self.config.model.image.timesteps
        if not steps:
            loss, retrieval = _contrastive(*self._embedded(params, [images, *caption]))
            return {"loss": loss, "retrieval": retrieval}
        found = {}
        for level in NOISE_LEVELS:
            t = round(level * (steps - 1))
            timesteps = jnp.full(len(images), t)
            rows = [self._noised(images, timesteps, jax.random.fold_in(key, t)), *caption, timesteps]
            found[f"loss_t{t}"], found[f"retrieval_t{t}"] = _contrastive(*self._embedded(params, rows))
        loss, _ = self.loss(params, {}, batch, key, train=False)
        return {"loss": loss, "retrieval": found["retrieval_t0"]} | found

    def project(self, params: Params) -> Params:
        ceiling = jnp.log(jnp.float32(self.config.model.max_scale))
        return params | {"logit_scale": jnp.minimum(params["logit_scale"], ceiling)}

    def _normalized(self, images: Array) -> Array:
        """Standardises pictures in [-1, 1] for the towers, by the mean and std of pixels in [0, 1]."""
        m = self.config.model
        mean, std = (jnp.asarray(v, jnp.float32).reshape(1, 1, 1, 3) for v in (m.mean, m.std))
        return ((images + 1) / 2 - mean) / std


def _contrastive(z_i: Array, z_t: Array, scale: Array) -> tuple[Array, Array]:
    """Computes the loss, and the share of rows that find their own, averaged over both directions.

    z_i, z_t (B, dim) of unit norm; scale () or, of each row, (B, 1).
    """
    # Each device compares its own rows to all others, which come to it.
    both = [scale * z_i @ replicate(z_t).T, scale * z_t @ replicate(z_i).T]
    pairs = jnp.eye(len(z_i), dtype=bool)
    own = [jnp.sum(jnp.where(pairs, logits, 0.0), axis=1) for logits in both]
    losses = [jnp.mean(jax.nn.logsumexp(a, axis=1) - b) for a, b in zip(both, own, strict=True)]
    hits = jnp.stack([jnp.argmax(logits, axis=1) == jnp.arange(len(z_i)) for logits in both])
    return 0.5 * (losses[0] + losses[1]), jnp.mean(hits.astype(jnp.float32))
