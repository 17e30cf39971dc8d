"""Training losses, one number per example, averaged over its elements.

    L_simple = mean (eps - eps_hat)^2           (arXiv 2006.11239, eq. 14), or mean (x_0 - x0_hat)^2
    L_vb     = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for t > 0, -log p(x_0 | x_1) for t = 0, in bits
    L        = L_simple + (n / 1000) L_vb       (improved DDPM, arXiv 2102.09672, section 3.1, over n steps)
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32

from unclip_jax.arrays import Array
from unclip_jax.diffusion.process import posterior_mean_variance, predict
from unclip_jax.diffusion.schedule import NoiseSchedule, Rows, StepIndices, table_at


def training_loss(
    schedule: NoiseSchedule,
    output: Float[Array, "B *places outputs"],
    x0: Rows,
    x_t: Rows,
    noise: Rows,
    t: StepIndices,
    predicts: str,
    learned_variance: bool,
    snr_clip: tuple[float, float] | None,
) -> tuple[Float32[Array, " B"], dict[str, Float32[Array, " B"]]]:
    """Loss of a network's `output` at x_t = q_sample(x0, t, noise), and its terms "mse" and, where learned, "vb".

    predicts, learned_variance: as in `process.predict`.
    snr_clip: None, or (low, high): an x0 error counts clip(SNR_t, low, high) times, SNR_t = alpha_bar_t / beta_bar_t.

    The "mse" term is unweighted, "vb" is scaled by n / 1000. L_vb trains the variance alone: the mean in it is held
    fixed, or its noisy gradient would drown that of L_simple. Raises ValueError for snr_clip with a network that
    predicts eps.
    """
    if snr_clip is not None and predicts != "x0":
        raise ValueError(f"snr_clip weighs errors of x0, but the network predicts {predicts!r}: set snr_clip to None")
    prediction = predict(schedule, output, x_t, t, predicts, learned_variance)
    error = prediction.eps - noise if predicts == "eps" else prediction.x0 - x0
    mse = _mean_per_example(jnp.square(error))
    loss, terms = mse, {"mse": mse}
    if snr_clip is not None:
        snr = table_at(schedule.alpha_bars, t, mse) / table_at(schedule.beta_bars, t, mse)
        loss = mse * jnp.clip(snr, *snr_clip)
    if learned_variance:
        held = jax.lax.stop_gradient(prediction.x0)
        vb = vlb_bits(schedule, x0, x_t, t, held, prediction.log_variance) * (schedule.num_steps / 1000)
        loss, terms = loss + vb, terms | {"vb": vb}
    return loss, terms


def vlb_bits(
    schedule: NoiseSchedule,
    x0: Rows,
    x_t: Rows,
    t: StepIndices,
    x0_hat: Rows,
    log_variance: Float[Array, "#B *#dims"] | None,
) -> Float32[Array, " B"]:
    """Term of the variational bound at step t, in bits per element.

    p(x_{t-1} | x_t) has the posterior's mean for `x0_hat` and the given log variance; None stands for the posterior's
    own variance. x0 in [-1, 1] counts as 8-bit pixels at t = 0.
    """
    mean, _, posterior_log_variance = posterior_mean_variance(schedule, x0_hat, x_t, t)
    if log_variance is None:
        log_variance = posterior_log_variance
    # Both means share their x_t part; leaving it out keeps the small difference exact.
    mean_gap = table_at(schedule.posterior_x0_weight, t, x_t) * (x0 - x0_hat)
    log_ratio = posterior_log_variance - log_variance
    kl = 0.5 * (jnp.expm1(log_ratio) - log_ratio + jnp.square(mean_gap) * jnp.exp(-log_variance))
    nll = -_pixel_log_likelihood(x0, mean, 0.5 * log_variance)
    return jnp.where(t == 0, _mean_per_example(nll), _mean_per_example(kl)) / math.log(2)


def _pixel_log_likelihood(x: Rows, mean: Rows, log_scale: Float[Array, "..."]) -> Rows:
    """Log mass that N(mean, exp(log_scale)^2) gives the 8-bit bin around x; the bins of -1 and 1 are open outwards."""
    inverse_scale = jnp.exp(-log_scale)
    below_top = _normal_cdf((x - mean + 1 / 255) * inverse_scale)
    below_bottom = _normal_cdf((x - mean - 1 / 255) * inverse_scale)
    mass = jnp.where(x < -0.999, below_top, jnp.where(x > 0.999, 1 - below_bottom, below_top - below_bottom))
    return jnp.log(jnp.maximum(mass, 1e-12))


def _normal_cdf(x: Rows) -> Rows:
    # The tanh form is part of the published loss, not a shortcut.
    return 0.5 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _mean_per_example(x: Rows) -> Float[Array, " B"]:
    return jnp.mean(x, axis=tuple(range(1, x.ndim)))
