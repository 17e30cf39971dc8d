"""Wrappers that turn a denoiser into another, innermost first:

    denoiser = make_denoiser(network, schedule, "eps", learned_variance=True)
    denoiser = clip_x0(classifier_free(denoiser, scale), schedule, 1.0)

CLIP guidance comes in two forms: `condition_eps` wraps a denoiser and suits DDIM, `condition_mean` wraps a step and
suits DDPM. Both follow the gradient of a noised CLIP or, by `through_x0`, of another.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from unclip_jax.arrays import Array, Scalar
from unclip_jax.diffusion.process import Denoiser, Prediction, eps_from_x0, x0_from_eps
from unclip_jax.diffusion.samplers import Step
from unclip_jax.diffusion.schedule import NoiseSchedule, Rows, StepIndex, table_at

Gradient = Callable[[Rows, Int[Array, " B"]], Rows]  # (x_t, original timesteps) -> gradient in x_t
Known = bool | Bool[Array, "#B *#dims"]  # True where the true x_0 is given


def classifier_free(denoiser: Denoiser, scale: Scalar) -> Denoiser:
    """Guides without a classifier: unconditional + scale (conditional - unconditional), for x0 and eps alike.

    The given denoiser predicts for 2B rows: B conditional ones, then the same B unconditional. The result takes B rows.
    scale 1 is the conditional prediction, 0 the unconditional one (GLIDE, arXiv 2112.10741, section 2.3). The log
    variance is the conditional one, unguided.
    """

    def denoise(x_t: Rows, i: StepIndex) -> Prediction:
        both = denoiser(jnp.concatenate([x_t, x_t]), i)
        mix = jnp.asarray(scale, jnp.float32)

        def guide(rows: Rows) -> Float[Array, " half *dims"]:
            conditional, unconditional = jnp.split(rows, 2)
            return mix * conditional + (1 - mix) * unconditional

        log_variance = None if both.log_variance is None else jnp.split(both.log_variance, 2)[0]
        return Prediction(guide(both.x0), guide(both.eps), log_variance)

    return denoise


def clip_x0(denoiser: Denoiser, schedule: NoiseSchedule, limit: Scalar) -> Denoiser:
    """Clips the predicted x0 to [-limit, limit], and makes eps agree with it."""

    def denoise(x_t: Rows, i: StepIndex) -> Prediction:
        prediction = denoiser(x_t, i)
        limit_ = jnp.asarray(limit, jnp.float32)
        x0 = jnp.clip(prediction.x0, -limit_, limit_)
        return prediction._replace(x0=x0, eps=eps_from_x0(schedule, x_t, i, x0))

    return denoise


def known_pixels(denoiser: Denoiser, schedule: NoiseSchedule, x0: Rows, known: Known) -> Denoiser:
    """Replaces the predicted x0 by the true one wherever `known` is True, and makes eps agree with it.

    For networks that receive the known pixels as an input, as GLIDE's inpainting network does.
    """

    def denoise(x_t: Rows, i: StepIndex) -> Prediction:
        prediction = denoiser(x_t, i)
        filled = jnp.where(known, x0, prediction.x0)
        return prediction._replace(x0=filled, eps=eps_from_x0(schedule, x_t, i, filled))

    return denoise


def known_states(step: Step, x0: Rows, known: Known) -> Step:
    """Replaces x_{t-1} by a draw of q(x_{t-1} | x_0) wherever `known` is True: by x0 itself after the last step.

    This is inpainting by a network that was not trained for it (arXiv 2112.10741, section 2.5).
    """

    def replaced(x_t: Rows, i: StepIndex, prediction: Prediction, schedule: NoiseSchedule, noise: Rows) -> Rows:
        x_prev = step(x_t, i, prediction, schedule, noise)
        # The known pixels of x_prev, and the noise in them, are thrown away here: the same noise can serve once more.
        signal, spread = (jnp.sqrt(table_at(t, i, x_t)) for t in (schedule.alpha_bars_prev, schedule.beta_bars_prev))
        return jnp.where(known, signal * x0 + spread * noise, x_prev)

    return replaced


def condition_mean(step: Step, gradient: Gradient, scale: Scalar) -> Step:
    """Shifts the mean of p(x_{t-1} | x_t) by scale * variance * gradient(x_t, timesteps).

    GLIDE's CLIP guidance (arXiv 2112.10741, section 2.4): the gradient is that of the scaled dot product of noised CLIP
    embeddings, summed over the batch. The variance is the prediction's, or the posterior's where none is predicted.
    """

    def conditioned(x_t: Rows, i: StepIndex, prediction: Prediction, schedule: NoiseSchedule, noise: Rows) -> Rows:
        if prediction.log_variance is None:
            variance = table_at(schedule.posterior_variance, i, x_t)
        else:
            variance = jnp.exp(prediction.log_variance)
        shift = variance * gradient(x_t, _timesteps(schedule, x_t, i))
        return step(x_t, i, prediction, schedule, noise) + jnp.asarray(scale, jnp.float32) * shift

    return conditioned


def condition_eps(denoiser: Denoiser, schedule: NoiseSchedule, gradient: Gradient, scale: Scalar) -> Denoiser:
    """Shifts eps by -scale * sqrt(beta_bar_t) * gradient(x_t, timesteps), and makes x0 agree with it.

    This is the guidance of `condition_mean` for deterministic steps (arXiv 2105.05233, algorithm 2).
    """

    def denoise(x_t: Rows, i: StepIndex) -> Prediction:
        prediction = denoiser(x_t, i)
        shift = table_at(schedule.sqrt_beta_bars, i, x_t) * gradient(x_t, _timesteps(schedule, x_t, i))
        eps = prediction.eps - jnp.asarray(scale, jnp.float32) * shift
        return prediction._replace(x0=x0_from_eps(schedule, x_t, i, eps), eps=eps)

    return denoise


def through_x0(gradient: Gradient, denoiser: Denoiser) -> Gradient:
    """Turns the gradient of a similarity S of clean pictures, given at any x0, into that of S(predicted x0) by x_t.

    For a CLIP that saw no noise, to which x_t is unlike any picture that it knows (GLIDE, arXiv 2112.10741, section 2.4
    and figure 10, without the augmentations and perceptual losses there). The prediction is differentiated through the
    network, in every step.

    denoiser: of the whole chain, whose step indices are the original timesteps; all rows have the same one.
    """

    def by_x_t(x_t: Rows, timesteps: Int[Array, " B"]) -> Rows:
        x0, back = jax.vjp(lambda x_t: denoiser(x_t, timesteps[0]).x0, x_t)
        return back(gradient(x0, timesteps))[0]

    return by_x_t


def _timesteps(schedule: NoiseSchedule, x_t: Rows, i: StepIndex) -> Int[Array, " B"]:
    return jnp.broadcast_to(jnp.asarray(schedule.timesteps)[i], x_t.shape[:1])
