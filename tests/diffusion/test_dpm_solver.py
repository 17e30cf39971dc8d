"""DPM-Solver++(2M) against the exact solution for Gaussian data, DDIM, and the papers' formula step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_samplers import COSINE, KEY, LINEAR, V, gaussian, oracle, start

from unclip_jax.diffusion.process import Prediction
from unclip_jax.diffusion.samplers import ddim_step, dpm_solver_step, sample
from unclip_jax.diffusion.schedule import first_steps, respace


def error(schedule, step, looks_back=False):
    """Largest error relative to the probability flow of Gaussian data, which only rescales."""
    x_T = start(schedule, (2, 50))
    alpha_bar, beta_bar = float(schedule.alpha_bars[-1]), float(schedule.beta_bars[-1])
    exact = np.asarray(x_T, np.float64) * np.sqrt(V / (alpha_bar * V + beta_bar))
    x = np.asarray(sample(gaussian(schedule, False), schedule, x_T, KEY, step, looks_back=looks_back), np.float64)
    return np.abs(x / exact - 1).max()


@pytest.mark.parametrize("whole", [COSINE, LINEAR], ids=["cosine", "linear"])
def test_twice_the_steps_have_less_than_half_the_error(whole):
    """Second order: better than DDIM, whose error halves at best."""
    errors = [error(respace(whole, f"logsnr{n}"), dpm_solver_step, True) for n in (10, 20, 40)]
    assert errors[1] < 0.45 * errors[0] and errors[2] < 0.4 * errors[1]
    assert errors[1] < 0.25 * error(respace(whole, "20"), ddim_step(0.0))


@pytest.mark.parametrize("spec", ["1", "2", "20", "fast27"])
def test_a_denoiser_that_knows_the_answer_is_believed(spec):
    schedule, x0 = respace(COSINE, spec), jax.random.normal(KEY, (2, 7))
    x = sample(oracle(schedule, x0), schedule, start(schedule, (2, 7)), KEY, dpm_solver_step, looks_back=True)
    np.testing.assert_allclose(x, x0, atol=1e-5)


@pytest.mark.parametrize("i", [0, 4])
def test_the_first_and_the_last_step_are_ddims(i):
    schedule, (x_t, x0, previous, noise) = respace(COSINE, "5"), jax.random.normal(KEY, (4, 3, 8))
    prediction = oracle(schedule, x0)(x_t, i)._replace(previous_x0=previous, log_variance=noise)
    found = dpm_solver_step(x_t, i, prediction, schedule, noise)
    np.testing.assert_allclose(found, ddim_step(0.0)(x_t, i, prediction, schedule, noise), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("i", [1, 2, 3])
def test_a_step_in_between_by_the_papers_formula(i):
    """Algorithm 2 in float64: D = (1 + 1 / 2r) x0_i - x0_{i-1} / 2r; x = s' / s x - a' (e^-h - 1) D."""
    schedule, (x_t, x0, previous) = respace(LINEAR, "5"), np.random.default_rng(0).normal(size=(3, 2, 6))
    alpha, sigma = np.sqrt(np.float64(schedule.alpha_bars)), np.sqrt(np.float64(schedule.beta_bars))
    log_snr = np.log(alpha / sigma)
    h, h_before = log_snr[i - 1] - log_snr[i], log_snr[i] - log_snr[i + 1]
    r = h_before / h
    D = (1 + 1 / (2 * r)) * x0 - previous / (2 * r)
    expected = sigma[i - 1] / sigma[i] * x_t - alpha[i - 1] * np.expm1(-h) * D
    prediction = Prediction(*map(jnp.float32, (x0, x0)), None, jnp.float32(previous))
    found = dpm_solver_step(jnp.float32(x_t), i, prediction, schedule, jnp.float32(x_t))
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)


def test_a_chain_that_starts_within_begins_with_ddims_step():
    schedule, (x_t, x0) = first_steps(respace(COSINE, "9"), 5), jax.random.normal(KEY, (2, 3, 8))
    prediction = oracle(schedule, x0)(x_t, 4)._replace(previous_x0=jnp.zeros_like(x0))
    found = dpm_solver_step(x_t, 4, prediction, schedule, x_t)
    np.testing.assert_allclose(found, ddim_step(0.0)(x_t, 4, prediction, schedule, x_t), rtol=1e-4, atol=1e-5)
