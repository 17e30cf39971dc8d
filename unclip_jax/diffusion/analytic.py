"""Analytic-DPM (arXiv 2201.06503): the best variance of a reverse step, for data that is not known exactly.

A step from t to the less noisy s draws from q(x_s | x_t, x_0), with the predicted x_0 in place of the true one:

    mean      = a x_0 + b x_t,  b = sqrt((beta_bar_s - l^2) / beta_bar_t),  a = sqrt(alpha_bar_s) - b sqrt(alpha_bar_t)
    variance  = l^2 = eta^2 beta-tilde_t    (eta = 1: DDPM's chain; eta = 0: DDIM's)

The true x_0 differs from the predicted one, by C_t per dimension on average, and moves the mean with it. The best
Gaussian for q(x_s | x_t) therefore has

    sigma*^2  = l^2 + a^2 C_t,    C_t = E |x_0 - E[x_0 | x_t]|^2 / d

C_t is measured once for a trained network, as its own mean squared error at t. That is never negative, it is an upper
bound for an imperfect network, and float32 holds it. (The paper's E |eps|^2 gives the same C_t as a difference of
nearly equal numbers, times beta_bar_t / alpha_bar_t, up to 4e8.)
"""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int

from unclip_jax.arrays import Array, Scalar
from unclip_jax.diffusion.process import Denoiser, q_sample
from unclip_jax.diffusion.schedule import NoiseSchedule, Rows, Table


def reverse_weights(schedule: NoiseSchedule, eta: Scalar) -> tuple[Table, Table, Table]:
    """a, b and l^2 of every step of `schedule`, for eta in [0, 1]; in float64 where both come from the host."""
    # Only sums of positive numbers: float32 would not hold the module docstring's differences.
    posterior = schedule.posterior_variance
    added = eta**2 * posterior
    kept = (1 - eta**2) * posterior + schedule.posterior_x_t_weight**2 * schedule.beta_bars  # beta_bar_s - l^2
    x_t_weight = (kept / schedule.beta_bars) ** 0.5
    squares = (schedule.alpha_bars_prev * schedule.betas + added * schedule.alpha_bars) / schedule.beta_bars
    x0_weight = squares / (schedule.alpha_bars_prev**0.5 + x_t_weight * schedule.sqrt_alpha_bars)
    return x0_weight, x_t_weight, added


def analytic_variance(schedule: NoiseSchedule, C: Table, eta: Scalar) -> Table:
    """sigma*^2 of every step of `schedule`, for eta in [0, 1]; in float64 where all three come from the host.

    Raises ValueError unless C has one number per step.
    """
    if C.shape != schedule.betas.shape:
        raise ValueError(f"C of shape {C.shape} for a schedule of {schedule.num_steps} steps: expected "
                         f"{schedule.betas.shape}, one number per step")
    x0_weight, _, added = reverse_weights(schedule, eta)
    return added + x0_weight**2 * C


def squared_errors(denoiser: Denoiser, schedule: NoiseSchedule, x0: Rows, noise: Rows) -> Float32[Array, " n"]:
    """Mean squared error of the predicted x_0 at each step of `schedule`, over one batch.

    denoiser: the one that will be sampled, but without guidance.
    x0: held-out data, in the space and under the conditions that the denoiser was made for.
    noise: standard normal; the same is used at every step.
    """

    def error(i: Int[Array, ""]) -> Float[Array, ""]:
        prediction = denoiser(q_sample(schedule, x0, i, noise), i)
        return jnp.mean(jnp.square(x0 - prediction.x0))

    return jax.lax.map(error, jnp.arange(schedule.num_steps, dtype=jnp.int32))


def estimate_C(errors: Float[Array, "batches n"], limit: Scalar) -> Float32[Array, " n"]:
    """C from the `squared_errors` of batches of equal size: their mean, at most `limit`.

    limit: an upper bound of any posterior variance: the data's mean square per dimension, or 1 for data in [-1, 1].
    """
    return jnp.minimum(jnp.mean(errors, axis=0), jnp.asarray(limit, jnp.float32))
