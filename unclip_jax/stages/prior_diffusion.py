"""The diffusion prior: caption → CLIP image embedding (arXiv 2204.06125, section 2.2).

x0 = `embedding_scale` · z_i; L = E ‖f(x_t, t, caption, z_t) − x0‖² averaged over elements. Caption and z_t count as one
condition and are dropped together. Sampling draws two embeddings and keeps the one nearer z_t.

Sampled by "analytic", its steps have Analytic-DPM's variance (arXiv 2201.06503), which is stored with the weights.

Karlo's form, for its public weights: the caption as CLIP's text tower reads it, a dropped one being the empty caption,
and z_i whitened by a mean and a standard deviation per dimension that are stored with the weights; `prepare` finds them
in training embeddings.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float
from ml_collections import ConfigDict

from unclip_jax.arrays import Array, Batch, Key, Params
from unclip_jax.diffusion.analytic import estimate_C, squared_errors
from unclip_jax.diffusion.guidance import clip_x0
from unclip_jax.diffusion.process import Network, make_denoiser
from unclip_jax.diffusion.schedule import make_schedule
from unclip_jax.keys import fold_in
from unclip_jax.models.clip import normalize
from unclip_jax.models.prior_diffusion import DiffusionPrior
from unclip_jax.stages.base import Metrics, Scalars, diffusion_loss, draw, empty_caption, trained
from unclip_jax.stages.conditions import Conditions, captions
from unclip_jax.stages.prior import Prior
from unclip_jax.training.sharding import to_host

WHITENED_FROM = 16_384  # training embeddings at least, of which mean and standard deviation are found
ESTIMATED_FROM = 512  # noised embeddings at each timestep, of which the variances are estimated


class PriorDiffusion(Prior):
    """Batches give pictures and captions for CLIP, and the caption again in the prior's own tokens."""

    @property
    def texts(self) -> dict[str, tuple[str, int, bool]]:
        own = {"tokens": ("own", self.config.model.context, False)} if self._own_text else {}
        if self._own_text and self.embedded:
            return own
        return own | {"clip_tokens": ("clip", self.clip.config.model.text.context, True)}

    @property
    def _own_text(self) -> bool:
        return self.config.model.caption == "own"

    def _model(self) -> DiffusionPrior:
        return DiffusionPrior(**self.config.model, dtype=jnp.dtype(self.config.dtype))

    def init(self, key: Key) -> Params:
        m = self.config.model
        one = jnp.ones((1,), jnp.int32)
        z = jnp.zeros((1, m.embedding_dim))
        shape = (1, m.context) if self._own_text else (1, m.context, self.clip.config.model.text.width)
        caption = jnp.zeros(shape, jnp.int32 if self._own_text else jnp.float32)
        params = self._model().init(key, z, one, caption, one, z)["params"]
        whitening = {"embedding_mean": jnp.zeros(m.embedding_dim), "embedding_std": jnp.ones(m.embedding_dim)}
        params = params | whitening if self.config.diffusion.whiten else params
        # C = 0 is the posterior's variance, which serves until the training is done.
        return params | {"fixed": {"C": jnp.zeros(self.config.diffusion.timesteps)}} if self._analytic else params

    def adapt_params(self, params: Params, config: ConfigDict) -> Params:
        """Drops the analytic variances of a trained prior, or makes room for them, as the sampler needs."""
        if self._analytic == ("fixed" in params):
            return params
        variances = {"fixed": {"C": np.zeros(self.config.diffusion.timesteps, np.float32)}}
        return params | variances if self._analytic else trained(params)

    @property
    def _analytic(self) -> bool:
        return self.config.sampling.sampler == "analytic"

    def prepare(self, params: Params, frozen: Params, batches: Iterator[Batch]) -> tuple[Params, Scalars]:
        """Finds the mean and standard deviation of training embeddings, where embeddings are whitened by them."""
        if not self.config.diffusion.whiten:
            return params, {}
        embed = jax.jit(lambda frozen, batch: self.embeddings(frozen, batch)[0])
        found: list[np.ndarray] = []
        while sum(len(rows) for rows in found) < WHITENED_FROM:
            found.append(to_host(embed(frozen, next(batches))).astype(np.float64))
        z_i = np.concatenate(found)
        std = np.std(z_i, axis=0)
        std = np.where(std > 0, std, 1.0)  # of a dimension in which nothing differs
        fitted = {"embedding_mean": np.mean(z_i, axis=0), "embedding_std": std}
        said = {"whitened_from": len(z_i), "std_least": std.min(), "std_most": std.max()}
        return params | {name: np.float32(value) for name, value in fitted.items()}, jax.tree.map(jnp.float32, said)

    @property
    def finishes(self) -> bool:
        return self._analytic

    def finish(self, params: Params, frozen: Params, batch: Batch, key: Key) -> tuple[Params, Scalars]:
        """Estimates the analytic variances of all timesteps; reports the error at the least and the most noise."""
        if not self._analytic:
            return {}, {}
        C = self._errors(params, frozen, batch, key)
        return {"fixed": {"C": C}}, {"C_least_noise": C[0], "C_most_noise": C[-1]}

    def _errors(self, params: Params, frozen: Params, batch: Batch, key: Key) -> Float[Array, " timesteps"]:
        """Estimates C, a number for each timestep, from the network's errors on a batch (analytic.py): on each of its
        embeddings as often as makes `ESTIMATED_FROM`."""
        batch = {name: rows[:ESTIMATED_FROM] for name, rows in batch.items()}
        z_i, z_t = self.embeddings(frozen, batch)
        condition = self._condition(frozen, batch, z_t, jnp.ones(len(z_i), bool))
        network, mean, std = self._network(params, condition)
        x0 = self.config.diffusion.embedding_scale * ((z_i - mean) / std)
        d, limit = self.config.diffusion, self.config.sampling.clip_x0
        schedule = make_schedule(d.schedule, d.timesteps)
        denoiser = make_denoiser(network, schedule, d.predicts, d.learned_variance)
        denoiser = clip_x0(denoiser, schedule, limit) if limit else denoiser
        noises = jax.random.normal(key, (-(-ESTIMATED_FROM // len(x0)), *x0.shape))
        errors = jax.lax.map(lambda noise: squared_errors(denoiser, schedule, x0, noise), noises)
        return estimate_C(errors, jnp.mean(jnp.square(x0)))

    def _network(self, params: Params, condition: tuple[Array, ...]) -> tuple[Network, Array | float, Array | float]:
        """The network under fixed conditions; mean and standard deviation by which embeddings are whitened."""
        weights, mean, std = self._whitening(params)
        return lambda x_t, t: self._model().apply({"params": weights}, x_t, t, *condition), mean, std

    def _whitening(self, params: Params) -> tuple[Params, Array | float, Array | float]:
        """Splits the network's parameters from the whitening's mean and standard deviation: (1, dim) each, never
        trained, or 0 and 1."""
        weights = trained(params)
        if not self.config.diffusion.whiten:
            return weights, 0.0, 1.0
        mean, std = (jax.lax.stop_gradient(weights.pop(f"embedding_{name}"))[None] for name in ("mean", "std"))
        return weights, mean, std

    def _condition(
        self, frozen: Params, captions: Batch, text_embedding: Float[Array, "B dim"], keep: Bool[Array, " B"]
    ) -> tuple[Array, ...]:
        """Computes the network's caption, length and text embedding; the caption is dropped where `keep` is False."""
        scale = self.config.diffusion.embedding_scale
        if self._own_text:
            own_length = jnp.where(keep, captions["tokens_length"], 0)
            return captions["tokens"], own_length, jnp.where(keep[:, None], scale * text_embedding, 0.0)
        tokens, length = captions["clip_tokens"], captions["clip_tokens_length"]
        nothing, no_length = empty_caption(tokens, length)
        tokens, length = jnp.where(keep[:, None], tokens, nothing), jnp.where(keep, length, no_length)
        empty_embedding, states = self.clip.embed_texts_with_states(frozen, tokens, length)
        return states, length, scale * jnp.where(keep[:, None], text_embedding, empty_embedding)

    def loss(
        self, params: Params, frozen: Params, batch: Batch, key: Key, train: bool = True
    ) -> tuple[Float[Array, ""], Metrics]:
        z_i, z_t = self.embeddings(frozen, batch)
        key_drop, key_loss = jax.random.split(key)
        keep = ~jax.random.bernoulli(key_drop, self.config.diffusion.drop_text if train else 0.0, z_i.shape[:1])
        network, mean, std = self._network(params, self._condition(frozen, batch, z_t, keep))
        x0 = self.config.diffusion.embedding_scale * ((z_i - mean) / std)
        return diffusion_loss(self.config, network, x0, key_loss)

    def sample(
        self, params: Params, frozen: Params, conditions: Conditions, key: Key
    ) -> Float[Array, "B dim"]:
        """Draws `sampling.draws` embeddings for each caption and keeps the one nearest to its text embedding."""
        draws, z_t = self.config.sampling.draws, conditions.text_embedding
        # Rows: every draw conditional, then, if guided, every draw unconditional.
        times = conditions.branches * draws
        keep = jnp.arange(times * len(z_t)) < draws * len(z_t)
        repeated = {name: jnp.concatenate([array] * times) for name, array in captions(conditions).items()}
        condition = self._condition(frozen, repeated, jnp.tile(z_t, (times, 1)), keep)
        network, mean, std = self._network(params, condition)
        C = params["fixed"]["C"] if self._analytic else None
        keys = jnp.concatenate([fold_in(key, draw) for draw in range(draws)]) if key.ndim else key
        drawn = draw(self.config, network, (draws * len(z_t), z_t.shape[-1]), conditions, keys, C=C)
        drawn = drawn / self.config.diffusion.embedding_scale * std + mean
        drawn = normalize(drawn) if self.clip.config.model.unit_norm else drawn
        drawn = drawn.reshape(draws, *z_t.shape)
        nearest = jnp.argmax(jnp.sum(drawn * z_t[None], axis=-1), axis=0)
        return jnp.take_along_axis(drawn, nearest[None, :, None], axis=0)[0]
