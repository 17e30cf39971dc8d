"""The forward process, its posteriors, and what a network's output says of a noisy x_t.

    q(x_t | x_0)          = N(sqrt(alpha_bar_t) x_0, beta_bar_t I)
    q(x_{t-1} | x_t, x_0) = N(posterior_x0_weight x_0 + posterior_x_t_weight x_t, beta-tilde_t I)

Arrays are float32 of shape (B, ...). A step index t is int32, either (B,) or a scalar shared by the batch, and counts
the steps of the schedule at hand; only networks are told the original timestep, `schedule.timesteps[t]`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from unclip_jax.diffusion.schedule import NoiseSchedule, table_at

PREDICTS = ("eps", "x0")


class Prediction(NamedTuple):
    """Prediction of a denoiser for x_t. x0 and eps agree: x_t = sqrt(alpha_bar_t) x0 + sqrt(beta_bar_t) eps."""

    x0: jax.Array
    eps: jax.Array
    log_variance: jax.Array | None  # of p(x_{t-1} | x_t); None where the network does not learn it


Denoiser = Callable[[jax.Array, jax.Array], Prediction]  # (x_t, scalar step index) -> Prediction
Network = Callable[[jax.Array, jax.Array], jax.Array]  # (x_t, original timesteps (B,) int32) -> output


def q_sample(schedule: NoiseSchedule, x0, t, noise):
    """x_t ~ q(x_t | x_0) with `noise` standard normal of x0's shape."""
    return table_at(schedule.sqrt_alpha_bars, t, x0) * x0 + table_at(schedule.sqrt_beta_bars, t, x0) * noise


def q_step(schedule: NoiseSchedule, x_prev, t, noise):
    """x_t ~ q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I): takes one step back towards noise."""
    beta = table_at(schedule.betas, t, x_prev)
    return jnp.sqrt(1 - beta) * x_prev + jnp.sqrt(beta) * noise


def x0_from_eps(schedule: NoiseSchedule, x_t, t, eps):
    """The x_0 that x_t was made from if its noise was `eps`."""
    return (x_t - table_at(schedule.sqrt_beta_bars, t, x_t) * eps) / table_at(schedule.sqrt_alpha_bars, t, x_t)


def eps_from_x0(schedule: NoiseSchedule, x_t, t, x0):
    """The noise in x_t if it was made from `x0`."""
    return (x_t - table_at(schedule.sqrt_alpha_bars, t, x_t) * x0) / table_at(schedule.sqrt_beta_bars, t, x_t)


def posterior_mean_variance(schedule: NoiseSchedule, x0, x_t, t):
    """(mean, variance, log variance) of q(x_{t-1} | x_t, x_0); the last two broadcast against x_t.

    The variance is 0 at t = 0; the log variance there is that of t = 1, so that it stays finite.
    """
    mean = table_at(schedule.posterior_x0_weight, t, x_t) * x0 + table_at(schedule.posterior_x_t_weight, t, x_t) * x_t
    return mean, table_at(schedule.posterior_variance, t, x_t), table_at(schedule.posterior_log_variance, t, x_t)


def predict(schedule: NoiseSchedule, output, x_t, t, predicts: str, learned_variance: bool) -> Prediction:
    """Reads a network's output, of any float type, as float32.

    predicts: "eps" or "x0", what the output stands for.
    learned_variance: the output's last axis is 2C for x_t's C. Its first half is the prediction; the second, v in
      about [-1, 1], places the log variance between that of the posterior (v = -1) and log beta_t (v = 1):
      improved DDPM (arXiv 2102.09672), eq. 15.
    """
    channels = x_t.shape[-1]
    expected = (*x_t.shape[:-1], 2 * channels if learned_variance else channels)
    if output.shape != expected:
        raise ValueError(f"network output of shape {output.shape} for x_t of shape {x_t.shape}: expected {expected} "
                         f"with learned_variance={learned_variance}")
    output = output.astype(jnp.float32)
    log_variance = None
    if learned_variance:
        output, v = output[..., :channels], output[..., channels:]
        fraction = (v + 1) / 2
        low, high = table_at(schedule.posterior_log_variance, t, x_t), table_at(schedule.log_betas, t, x_t)
        log_variance = fraction * high + (1 - fraction) * low
    if predicts == "eps":
        return Prediction(x0_from_eps(schedule, x_t, t, output), output, log_variance)
    if predicts == "x0":
        return Prediction(output, eps_from_x0(schedule, x_t, t, output), log_variance)
    raise ValueError(f"a network that predicts {predicts!r}: expected one of {', '.join(PREDICTS)}")


def make_denoiser(network: Network, schedule: NoiseSchedule, predicts: str, learned_variance: bool) -> Denoiser:
    """A denoiser over the steps of `schedule` from a network that is told original timesteps."""

    def denoise(x_t, i):
        timesteps = jnp.broadcast_to(jnp.asarray(schedule.timesteps)[i], x_t.shape[:1])
        return predict(schedule, network(x_t, timesteps), x_t, i, predicts, learned_variance)

    return denoise


def large_variance(denoiser: Denoiser, schedule: NoiseSchedule) -> Denoiser:
    """Samples with DDPM's larger fixed variance, beta_t, instead of the posterior's (that of t = 1 at t = 0)."""

    def denoise(x_t, i):
        first = table_at(schedule.posterior_log_variance, i, x_t)
        return denoiser(x_t, i)._replace(log_variance=jnp.where(i == 0, first, table_at(schedule.log_betas, i, x_t)))

    return denoise
