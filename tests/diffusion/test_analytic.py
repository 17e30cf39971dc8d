"""Analytic-DPM against Gaussian data N(0, v I), where all is known: V_t = alpha_bar_t v + beta_bar_t is the variance of
x_t, and C_t = v beta_bar_t / V_t that of x_0 given x_t."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.diffusion.analytic import analytic_variance, estimate_C, reverse_weights, squared_errors
from unclip_jax.diffusion.process import Prediction, eps_from_x0, predict
from unclip_jax.diffusion.samplers import analytic_dpm_step, ddim_step, ddpm_step, sample
from unclip_jax.diffusion.schedule import make_schedule, respace, table_at

COSINE = make_schedule("cosine", 1000)
SCHEDULE = respace(COSINE, "64")
KEY = jax.random.key(0)
ALPHA_S, BETA_S = SCHEDULE.alpha_bars_prev, SCHEDULE.beta_bars_prev
ALPHA_T, BETA_T = SCHEDULE.alpha_bars, SCHEDULE.beta_bars


def C_of(v):
    return v * BETA_T / (ALPHA_T * v + BETA_T)


def best_denoiser(v):
    def denoise(x_t, i):
        alpha_bar, beta_bar = table_at(ALPHA_T, i, x_t), table_at(BETA_T, i, x_t)
        x0 = jnp.sqrt(alpha_bar) * v / (alpha_bar * v + beta_bar) * x_t
        return Prediction(x0, eps_from_x0(SCHEDULE, x_t, i, x0), None)

    return denoise


@pytest.mark.parametrize("v", [1e-3, 0.0289, 0.289, 1.0, 7.0])
def test_variance_is_that_of_the_true_reverse_step(v):
    """q(x_s | x_t) of Gaussian data is Gaussian, with variance V_s - alpha_t|s V_s^2 / V_t."""
    V_t, V_s = ALPHA_T * v + BETA_T, ALPHA_S * v + BETA_S
    variance = analytic_variance(SCHEDULE, C_of(v), 1.0)
    assert variance.dtype == np.float64
    np.testing.assert_allclose(variance, V_s - (1 - SCHEDULE.betas) * V_s**2 / V_t, rtol=1e-10)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_variance_keeps_the_marginal_of_the_data(eta):
    """Whatever eta: the mean is k x_t for Gaussian data, and k^2 V_t + sigma*^2 must be V_s."""
    v = 0.289
    V_t, V_s = ALPHA_T * v + BETA_T, ALPHA_S * v + BETA_S
    direction = np.sqrt(BETA_S - eta**2 * SCHEDULE.posterior_variance)
    k = (np.sqrt(ALPHA_S * ALPHA_T) * v + direction * np.sqrt(BETA_T)) / V_t
    np.testing.assert_allclose(analytic_variance(SCHEDULE, C_of(v), eta), V_s - k**2 * V_t, rtol=1e-10)


@pytest.mark.parametrize(
    ("t", "s", "C", "variance"), [(16, 0, 1.3572e-3, 1.3163e-3), (507, 492, None, 4.5138e-2), (999, 983, None, 0.99955)]
)
def test_published_formula_by_hand(t, s, C, variance):
    """Values computed apart from this code, v = 0.289."""
    i = list(SCHEDULE.timesteps).index(t)
    assert SCHEDULE.timesteps[i - 1] == s
    assert analytic_variance(SCHEDULE, C_of(0.289), 1.0)[i] == pytest.approx(variance, rel=3e-5)
    assert C is None or C_of(0.289)[i] == pytest.approx(C, rel=3e-5)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("schedule", [SCHEDULE, COSINE], ids=["64", "1000"])
def test_float32_holds_the_formula(schedule, eta):
    """Schedule, C and eta are arguments of the program, in float32; the C of data with v = 0.289."""
    C = 0.289 * schedule.beta_bars / (schedule.alpha_bars * 0.289 + schedule.beta_bars)
    computed = jax.jit(analytic_variance)(schedule, C.astype(np.float32), jnp.float32(eta))
    assert computed.dtype == jnp.float32
    np.testing.assert_allclose(computed, analytic_variance(schedule, C, eta), rtol=2e-6)
    weights = jax.jit(reverse_weights)(schedule, jnp.float32(eta))
    chex.assert_trees_all_close(weights, reverse_weights(schedule, eta), rtol=2e-6)


def test_reverse_weights_of_ddpms_chain_are_the_posteriors():
    posterior = SCHEDULE.posterior_x0_weight, SCHEDULE.posterior_x_t_weight, SCHEDULE.posterior_variance
    chex.assert_trees_all_close(reverse_weights(SCHEDULE, 1.0), posterior, rtol=1e-12)


def test_the_last_step_adds_no_noise():
    x, noise = jnp.zeros((1, 4)), jnp.ones((1, 4))
    step = analytic_dpm_step(np.full(64, 0.2), 1.0)
    moved = [step(x, jnp.int32(i), Prediction(x, x, None), SCHEDULE, noise) for i in range(2)]
    np.testing.assert_array_equal(moved[0], x)
    variance = SCHEDULE.posterior_variance[1] + 0.2 * SCHEDULE.posterior_x0_weight[1] ** 2
    np.testing.assert_allclose(moved[1], np.full((1, 4), np.sqrt(variance)), rtol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_samples_have_the_variance_of_the_data(eta):
    """And the posterior's variance, DDPM's smaller choice, loses a tenth of it in 64 steps (0.2607, by recursion)."""
    v = 0.289
    x_T = jnp.sqrt(jnp.float32(ALPHA_T[-1] * v + BETA_T[-1])) * jax.random.normal(jax.random.key(1), (100, 1000))

    @jax.jit
    def variances(C, eta):
        steps = analytic_dpm_step(C, eta), ddpm_step
        return [jnp.var(sample(best_denoiser(v), SCHEDULE, x_T, KEY, step)) for step in steps]

    analytic, posterior = variances(C_of(v), eta)
    assert float(analytic) == pytest.approx(v - C_of(v)[0], rel=0.01)  # the last step adds no noise
    assert float(posterior) == pytest.approx(0.26071, rel=0.01)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_without_error_the_step_is_ddims(eta):
    """C = 0, an x_0 known exactly: sigma* = eta sqrt(beta-tilde), and eta = 1 is DDPM's step too."""
    x_t, x0, noise = (jax.random.normal(jax.random.fold_in(KEY, k), (2, 50)) for k in range(3))
    for i in (0, 1, 30, 63):
        i = jnp.int32(i)
        prediction = Prediction(x0, eps_from_x0(SCHEDULE, x_t, i, x0), None)
        arguments = x_t, i, prediction, SCHEDULE, noise
        moved = analytic_dpm_step(np.zeros(64), eta)(*arguments)
        np.testing.assert_allclose(moved, ddim_step(eta)(*arguments), atol=5e-5)
        if eta == 1:
            np.testing.assert_allclose(moved, ddpm_step(*arguments), atol=2e-6)


def test_errors_of_the_best_denoiser_are_C():
    """E over 200,000 numbers: a relative error of sqrt(2 / 200,000) = 0.3 %."""
    v = 0.289
    x0 = jnp.sqrt(jnp.float32(v)) * jax.random.normal(KEY, (200, 1000))
    noise = jax.random.normal(jax.random.fold_in(KEY, 1), x0.shape)
    errors = jax.jit(lambda x0, noise: squared_errors(best_denoiser(v), SCHEDULE, x0, noise))(x0, noise)
    np.testing.assert_allclose(errors, C_of(v), rtol=0.015)


def test_C_is_the_mean_over_batches_and_never_above_the_limit():
    """A network that always answers 0.5 errs by (x_0 - 0.5)^2; a limit below that is what comes out."""
    batches = jnp.array([[[0.5, 1.5]], [[2.5, -0.5]]])  # errors 0, 1, 4, 1

    def denoise(x_t, i):
        return predict(SCHEDULE, jnp.full_like(x_t, 0.5), x_t, i, "x0", False)

    errors = jnp.stack([squared_errors(denoise, SCHEDULE, x0, jnp.ones_like(x0)) for x0 in batches])
    np.testing.assert_allclose(estimate_C(errors, 9.0), np.full(64, 1.5), rtol=1e-6)
    np.testing.assert_allclose(estimate_C(errors, 1.2), np.full(64, 1.2), rtol=1e-6)


def test_each_step_is_measured_at_its_own_noise():
    """A denoiser that answers x_t itself errs by |x_0 - sqrt(alpha_bar) x_0 - sqrt(beta_bar) noise|^2."""
    x0, noise = jnp.array([[1.0, -2.0]]), jnp.array([[0.5, 3.0]])
    errors = squared_errors(lambda x_t, i: Prediction(x_t, x_t, None), SCHEDULE, x0, noise)
    a, b = np.sqrt(ALPHA_T), np.sqrt(BETA_T)
    expected = ((1 - a - 0.5 * b) ** 2 + (-2 + 2 * a - 3 * b) ** 2) / 2
    np.testing.assert_allclose(errors, expected, rtol=2e-4)


def test_a_table_of_another_schedule_is_refused():
    with pytest.raises(ValueError, match=r"C of shape \(1000,\) for a schedule of 64 steps"):
        sample(best_denoiser(1.0), SCHEDULE, jnp.zeros((1, 2)), KEY, analytic_dpm_step(np.zeros(1000), 1.0))
