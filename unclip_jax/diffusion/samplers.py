"""Sampling: one scan over the steps of a schedule, from the noisiest to the cleanest.

A step is a function (x_t, i, prediction, schedule, noise) -> x_{t-1}, with i a scalar step index and noise standard
normal of x_t's shape. The prediction is the denoiser's for x_t, guidance and clipping included.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from unclip_jax.arrays import Array, Key, Scalar
from unclip_jax.diffusion.analytic import analytic_variance, reverse_weights
from unclip_jax.diffusion.process import Denoiser, Prediction, posterior_mean_variance
from unclip_jax.diffusion.schedule import NoiseSchedule, Rows, StepIndex, Table, table_at
from unclip_jax.keys import draw_rows, fold_in

Step = Callable[[Rows, StepIndex, Prediction, NoiseSchedule, Rows], Rows]


def ddpm_step(x_t: Rows, i: StepIndex, prediction: Prediction, schedule: NoiseSchedule, noise: Rows) -> Rows:
    """Takes an ancestral step: x_{t-1} ~ N(posterior mean for the predicted x0, variance), without noise at i = 0.

    The variance is the prediction's, or the posterior's (DDPM's smaller choice) where none is predicted.
    """
    mean, _, log_variance = posterior_mean_variance(schedule, prediction.x0, x_t, i)
    if prediction.log_variance is not None:
        log_variance = prediction.log_variance
    return mean + jnp.where(i > 0, jnp.exp(0.5 * log_variance) * noise, 0.0)


def ddim_step(eta: Scalar) -> Step:
    """Makes the DDIM step (arXiv 2010.02502, eq. 12): sigma = eta sqrt(beta-tilde_t); eta = 0 is deterministic."""

    def step(x_t: Rows, i: StepIndex, prediction: Prediction, schedule: NoiseSchedule, noise: Rows) -> Rows:
        variance = jnp.square(jnp.asarray(eta, jnp.float32)) * table_at(schedule.posterior_variance, i, x_t)
        signal = jnp.sqrt(table_at(schedule.alpha_bars_prev, i, x_t))
        direction = jnp.sqrt(jnp.maximum(table_at(schedule.beta_bars_prev, i, x_t) - variance, 0.0))
        return signal * prediction.x0 + direction * prediction.eps + jnp.sqrt(variance) * noise

    return step


def analytic_dpm_step(C: Table, eta: Scalar) -> Step:
    """Makes the step of ddim_step(eta) with Analytic-DPM's variance (arXiv 2201.06503), and without noise at i = 0.

    C: the table of `analytic.estimate_C` for the schedule that is sampled, with or without guidance.
    eta: 1 is DDPM's chain.
    """

    def step(x_t: Rows, i: StepIndex, prediction: Prediction, schedule: NoiseSchedule, noise: Rows) -> Rows:
        x0_weight, x_t_weight, _ = reverse_weights(schedule, eta)
        mean = table_at(x0_weight, i, x_t) * prediction.x0 + table_at(x_t_weight, i, x_t) * x_t
        variance = table_at(analytic_variance(schedule, C, eta), i, x_t)
        return mean + jnp.where(i > 0, jnp.sqrt(variance) * noise, 0.0)

    return step


def dpm_solver_step(x_t: Rows, i: StepIndex, prediction: Prediction, schedule: NoiseSchedule, noise: Rows) -> Rows:
    """Takes a step of DPM-Solver++(2M), which is deterministic (arXiv 2211.01095, algorithm 2).

    It is of second order in the log-SNR, by the x0 that was predicted at the step before. The first step, which has
    none, and the last, which ends without noise, are of first order: that is DDIM. A predicted variance is not used.
    """
    x0 = prediction.x0
    if prediction.previous_x0 is not None:
        # A chain whose noisiest steps were cut off starts within the table.
        ratio = jnp.where(i == schedule.num_steps - 1, 0.0, table_at(schedule.log_snr_ratio, i, x_t))
        x0 = x0 + ratio * (x0 - prediction.previous_x0)
    return table_at(schedule.flow_x_t_weight, i, x_t) * x_t + table_at(schedule.flow_x0_weight, i, x_t) * x0


def sample(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x_T: Rows,
    key: Key | None,
    step: Step = ddpm_step,
    noise: Float[Array, "n B *dims"] | None = None,
    looks_back: bool = False,
) -> Rows:
    """Samples x_0 from x_T, the state at the schedule's last step.

    key: one for all rows, or keys (B,), one for each. The noise of step i is drawn from fold_in(key, i).
    noise: in place of it; noise[k] goes to the k-th step taken, and `key` is then not used.
    looks_back: `step` takes `Prediction.previous_x0`, which is 0 at the first step.

    Raises ValueError when `noise` does not have one x_T per step.
    """
    if noise is not None and noise.shape != (schedule.num_steps, *x_T.shape):
        raise ValueError(f"noise of shape {noise.shape}: expected one x_T per step, {(schedule.num_steps, *x_T.shape)}")

    def body(
        state: tuple[Rows, Rows | None], i_and_noise: tuple[Int[Array, ""], Rows | None]
    ) -> tuple[tuple[Rows, Rows | None], None]:
        (x_t, previous_x0), (i, step_noise) = state, i_and_noise
        if step_noise is None:
            assert key is not None, "a key, or the noise of every step"
            step_noise = draw_rows(jax.random.normal, fold_in(key, i), x_t.shape)
        x_t, x0 = _taken(denoiser, schedule, step, x_t, previous_x0, i, step_noise)
        return (x_t, x0 if looks_back else None), None

    indices = jnp.arange(schedule.num_steps - 1, -1, -1, dtype=jnp.int32)
    first: tuple[Rows, Rows | None] = (x_T, jnp.zeros_like(x_T) if looks_back else None)
    return jax.lax.scan(body, first, (indices, noise))[0][0]


def sample_part(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x_T: Rows,
    key: Key,
    step: Step,
    state: Float[Array, " state *dims"],
    first: StepIndex,
    count: Int[Array, ""],
    looks_back: bool = False,
) -> Float[Array, " state *dims"]:
    """Takes `count` of the steps of `sample`, from the one with index `first` on, and returns the state to go on from.

    A state is x_t and, below it, the x0 that was predicted last. The first of all steps makes its own of x_T.
    """
    begins = first == schedule.num_steps - 1
    x_t, x0 = jnp.split(state, 2)

    def body(k: Int[Array, ""], rows: tuple[Rows, Rows]) -> tuple[Rows, Rows]:
        noise = draw_rows(jax.random.normal, fold_in(key, first - k), x_T.shape)
        return _taken(denoiser, schedule, step, rows[0], rows[1] if looks_back else None, first - k, noise)

    start = jnp.where(begins, x_T, x_t), jnp.where(begins, jnp.zeros_like(x0), x0)
    return jnp.concatenate(jax.lax.fori_loop(0, count, body, start))


def _taken(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    step: Step,
    x_t: Rows,
    previous_x0: Rows | None,
    i: StepIndex,
    noise: Rows,
) -> tuple[Rows, Rows]:
    """Takes step i: x_{t-1}, and the x0 that it was led by."""
    prediction = denoiser(x_t, i)._replace(previous_x0=previous_x0)
    return step(x_t, i, prediction, schedule, noise), prediction.x0


def ddim_invert(denoiser: Denoiser, schedule: NoiseSchedule, x_0: Rows) -> Rows:
    """Inverts x_0 to the x_T from which `sample` with ddim_step(0) nearly restores it (arXiv 2105.05233, app. F).

    This is DDIM run upwards. x_0 stands in for the state at step 0 and is carried up to the last step, where `sample`
    starts: one step fewer than the schedule has. For exact reconstruction the denoiser should neither clip nor guide.
    Raises ValueError for a schedule of a single step.
    """
    if schedule.num_steps < 2:
        raise ValueError("DDIM inversion over a schedule of one step: expected at least 2 steps")

    def body(x_t: Rows, i: Int[Array, ""]) -> tuple[Rows, None]:
        prediction = denoiser(x_t, i)
        signal = jnp.sqrt(table_at(schedule.alpha_bars_next, i, x_t))
        direction = jnp.sqrt(table_at(schedule.beta_bars_next, i, x_t))
        return signal * prediction.x0 + direction * prediction.eps, None

    return jax.lax.scan(body, x_0, jnp.arange(schedule.num_steps - 1, dtype=jnp.int32))[0]
