"""The forward process, its posteriors, and reading a network's output as a prediction of x_0 and eps.

    q(x_t | x_0)          = N(sqrt(alpha_bar_t) x_0, beta_bar_t I)
    q(x_{t-1} | x_t, x_0) = N(posterior_x0_weight x_0 + posterior_x_t_weight x_t, beta-tilde_t I)

Arrays are float32. An index t counts the steps of the given schedule, from 0; only networks receive the step's timestep
in the original chain, `schedule.timesteps[t]`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Float, Float32, Int

from unclip_jax.arrays import Array
from unclip_jax.diffusion.schedule import NoiseSchedule, Rows, StepIndex, StepIndices, table_at

PREDICTS = ("eps", "x0")


class Prediction(NamedTuple):
    """Prediction of a denoiser for x_t. x0 and eps agree: x_t = sqrt(alpha_bar_t) x0 + sqrt(beta_bar_t) eps."""

    x0: Rows
    eps: Rows
    log_variance: Rows | None  # of p(x_{t-1} | x_t); None where the network does not learn it
    previous_x0: Rows | None = None  # predicted at the step taken before, for samplers that look back


Denoiser = Callable[[Rows, StepIndex], Prediction]  # (x_t, step index) -> Prediction
Network = Callable[[Rows, Int[Array, " B"]], Float[Array, "B *places outputs"]]  # (x_t, original timesteps) -> output


def q_sample(schedule: NoiseSchedule, x0: Rows, t: StepIndices, noise: Rows) -> Rows:
    """Draws x_t ~ q(x_t | x_0), given standard normal `noise`."""
    return table_at(schedule.sqrt_alpha_bars, t, x0) * x0 + table_at(schedule.sqrt_beta_bars, t, x0) * noise


def q_step(schedule: NoiseSchedule, x_prev: Rows, t: StepIndices, noise: Rows) -> Rows:
    """Draws x_t ~ q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I): one step back towards noise."""
    beta = table_at(schedule.betas, t, x_prev)
    return jnp.sqrt(1 - beta) * x_prev + jnp.sqrt(beta) * noise


def x0_from_eps(schedule: NoiseSchedule, x_t: Rows, t: StepIndices, eps: Rows) -> Rows:
    """The x_0 from which x_t was made, if its noise was `eps`."""
    return (x_t - table_at(schedule.sqrt_beta_bars, t, x_t) * eps) / table_at(schedule.sqrt_alpha_bars, t, x_t)


def eps_from_x0(schedule: NoiseSchedule, x_t: Rows, t: StepIndices, x0: Rows) -> Rows:
    """The noise in x_t, if it was made from `x0`."""
    return (x_t - table_at(schedule.sqrt_alpha_bars, t, x_t) * x0) / table_at(schedule.sqrt_beta_bars, t, x_t)


def posterior_mean_variance(
    schedule: NoiseSchedule, x0: Rows, x_t: Rows, t: StepIndices
) -> tuple[Rows, Float32[Array, "..."], Float32[Array, "..."]]:
    """(mean, variance, log variance) of q(x_{t-1} | x_t, x_0); the last two broadcast against x_t.

    The variance is 0 at t = 0; the log variance there is that of t = 1, so that it stays finite.
    """
    mean = table_at(schedule.posterior_x0_weight, t, x_t) * x0 + table_at(schedule.posterior_x_t_weight, t, x_t) * x_t
    return mean, table_at(schedule.posterior_variance, t, x_t), table_at(schedule.posterior_log_variance, t, x_t)


def predict(
    schedule: NoiseSchedule,
    output: Float[Array, "B *places outputs"],
    x_t: Float[Array, "B *places C"],
    t: StepIndices,
    predicts: str,
    learned_variance: bool,
) -> Prediction:
    """Reads a network's output, of any float type, as float32.

    predicts: "eps" or "x0", the quantity that the network predicts.
    learned_variance: the output has 2C channels for x_t's C. The first half is the prediction. The second half, v in
      about [-1, 1], sets the log variance between that of the posterior (v = -1) and log beta_t (v = 1):
      improved DDPM (arXiv 2102.09672), eq. 15.

    Raises ValueError for an output with another number of channels, and for an unknown `predicts`.
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
    """Makes a denoiser over the steps of `schedule` from a network that takes original timesteps."""

    def denoise(x_t: Rows, i: StepIndex) -> Prediction:
        timesteps = jnp.broadcast_to(jnp.asarray(schedule.timesteps)[i], x_t.shape[:1])
        return predict(schedule, network(x_t, timesteps), x_t, i, predicts, learned_variance)

    return denoise


def large_variance(denoiser: Denoiser, schedule: NoiseSchedule) -> Denoiser:
    """Predicts DDPM's larger fixed variance, beta_t, instead of the posterior's (at t = 0, that of t = 1)."""

    def denoise(x_t: Rows, i: StepIndex) -> Prediction:
        first = table_at(schedule.posterior_log_variance, i, x_t)
        return denoiser(x_t, i)._replace(log_variance=jnp.where(i == 0, first, table_at(schedule.log_betas, i, x_t)))

    return denoise
