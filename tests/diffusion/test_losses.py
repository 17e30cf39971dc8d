"""Training losses against closed forms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.diffusion.losses import training_loss, vlb_bits
from unclip_jax.diffusion.process import q_sample
from unclip_jax.diffusion.schedule import make_schedule, respace

COSINE = make_schedule("cosine", 1000)
CHAIN = respace(COSINE, "50")
KEYS = jax.random.split(jax.random.key(0), 3)
X0 = jax.random.uniform(KEYS[0], (3, 4, 4, 2), minval=-1.0, maxval=1.0)
NOISE = jax.random.normal(KEYS[1], X0.shape)
T = jnp.array([0, 10, 40])
X_T = q_sample(CHAIN, X0, T, NOISE)


def loss_of(output, predicts, learned=False, snr_clip=None, schedule=CHAIN):
    return training_loss(schedule, output, X0, X_T, NOISE, T, predicts, learned, snr_clip)


@pytest.mark.parametrize("predicts", ["eps", "x0"])
def test_mse_is_the_mean_square_of_the_error(predicts):
    target, offset = (NOISE if predicts == "eps" else X0), jnp.array([0.0, 0.5, 2.0]).reshape(3, 1, 1, 1)
    loss, terms = loss_of(target + offset, predicts)
    np.testing.assert_allclose(loss, [0.0, 0.25, 4.0], atol=1e-6)
    assert terms.keys() == {"mse"} and loss.dtype == jnp.float32


def test_x0_loss_is_weighted_by_clipped_snr():
    loss, terms = loss_of(X0 + 1, "x0", snr_clip=(0.5, 5.0))
    alpha_bars = COSINE.alpha_bars[CHAIN.timesteps[np.asarray(T)]]
    snr = alpha_bars / (1 - alpha_bars)
    assert snr[0] > 5 and snr[1] > 0.5 and snr[2] < 0.5
    np.testing.assert_allclose(loss, np.clip(snr, 0.5, 5.0), rtol=1e-5)
    np.testing.assert_allclose(terms["mse"], 1.0, rtol=1e-5)
    with pytest.raises(ValueError, match="set snr_clip to None"):
        loss_of(NOISE, "eps", snr_clip=(0.5, 5.0))


@pytest.mark.parametrize("length", [1000, 250])
@pytest.mark.parametrize("predicts", ["eps", "x0"])
def test_bound_is_scaled_to_the_thousand_steps_of_the_paper(predicts, length):
    schedule = respace(COSINE, str(length))
    output = jnp.concatenate([NOISE if predicts == "eps" else X0, jnp.zeros_like(X0)], -1)
    loss, terms = loss_of(output, predicts, learned=True, schedule=schedule)
    log_variance = 0.5 * (schedule.log_betas + schedule.posterior_log_variance)[np.asarray(T)].reshape(3, 1, 1, 1)
    x0_hat = X0 if predicts == "x0" else (X_T - schedule.sqrt_beta_bars[np.asarray(T)].reshape(3, 1, 1, 1).astype(
        np.float32) * NOISE) / schedule.sqrt_alpha_bars[np.asarray(T)].reshape(3, 1, 1, 1).astype(np.float32)
    bits = vlb_bits(schedule, X0, X_T, T, x0_hat, jnp.asarray(log_variance, jnp.float32))
    np.testing.assert_allclose(terms["vb"], np.asarray(bits) * length / 1000, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(loss, np.asarray(terms["mse"]) + np.asarray(terms["vb"]), rtol=1e-6)


@pytest.mark.parametrize("predicts", ["eps", "x0"])
def test_bound_trains_the_variance_alone(predicts):
    """For either parametrisation, L_vb has no gradient in the mean and L_simple none in the variance."""
    output = jax.random.normal(KEYS[2], (*X0.shape[:-1], 4)) * 0.3

    def term(output, name):
        return loss_of(output, predicts, learned=True)[1][name].sum()

    of_vb, of_mse = (np.asarray(jax.grad(term)(output, name)) for name in ("vb", "mse"))
    assert np.all(of_vb[..., :2] == 0) and np.any(of_vb[..., 2:] != 0)
    assert np.any(of_mse[..., :2] != 0) and np.all(of_mse[..., 2:] == 0)
    assert np.all(np.isfinite(of_vb))


@pytest.mark.parametrize("log_ratio", [-1.5, 0.2, 1.5])
@pytest.mark.parametrize("x0_hat", [0.4, 0.9])
def test_vlb_is_the_kl_of_two_gaussians(x0_hat, log_ratio):
    """For t > 0, by integrating the two densities numerically in float64."""
    s, i, x0, x_t = CHAIN, 10, 0.4, 0.1
    log_variance = s.posterior_log_variance[i] + log_ratio
    true_mean = s.posterior_x0_weight[i] * x0 + s.posterior_x_t_weight[i] * x_t
    mean = s.posterior_x0_weight[i] * x0_hat + s.posterior_x_t_weight[i] * x_t
    true_var, var = s.posterior_variance[i], np.exp(log_variance)
    x = np.linspace(true_mean - 10 * np.sqrt(true_var), true_mean + 10 * np.sqrt(true_var), 20_001)
    log_q = -0.5 * ((x - true_mean) ** 2 / true_var + np.log(2 * np.pi * true_var))
    log_p = -0.5 * ((x - mean) ** 2 / var + np.log(2 * np.pi * var))
    kl = np.trapezoid(np.exp(log_q) * (log_q - log_p), x)
    full = [jnp.full((1, 3), value, jnp.float32) for value in (x0, x_t, x0_hat, log_variance)]
    bits = vlb_bits(s, full[0], full[1], jnp.array([i]), full[2], full[3])
    np.testing.assert_allclose(bits, kl / np.log(2), rtol=1e-4)


def test_vlb_of_a_perfect_prediction_is_zero():
    bits = vlb_bits(CHAIN, X0, X_T, T, X0, None)
    np.testing.assert_allclose(bits[1:], 0, atol=1e-6)
    # At t = 0 the pixel itself is scored: the mass of one bin, 2/255 wide, around the mean.
    sigma = np.exp(0.5 * CHAIN.posterior_log_variance[0])
    assert float(bits[0]) == pytest.approx(-np.log2(math.erf(1 / 255 / sigma / np.sqrt(2))), rel=1e-3)


def test_pixel_masses_sum_to_one():
    """At t = 0 the bound is a distribution over the 256 values of a pixel."""
    pixels = (jnp.arange(256, dtype=jnp.float32) / 127.5 - 1)[:, None]
    for mean in (-1.0, -0.3, 0.995):
        for log_variance in (-4.0, -9.0):
            bits = vlb_bits(CHAIN, pixels, jnp.zeros((256, 1)), jnp.zeros(256, jnp.int32), jnp.full((256, 1), mean),
                            jnp.full((256, 1), log_variance))
            assert float(jnp.sum(2.0**-bits)) == pytest.approx(1, abs=1e-4)


def test_pixel_mass_of_a_wide_gaussian_is_density_times_width():
    pixel, mean, sigma = 0.2, 0.25, 0.3
    bits = vlb_bits(CHAIN, jnp.full((1, 1), pixel), jnp.zeros((1, 1)), jnp.array([0]), jnp.full((1, 1), mean),
                    jnp.full((1, 1), 2 * np.log(sigma), jnp.float32))
    mass = np.exp(-0.5 * ((pixel - mean) / sigma) ** 2) / (sigma * np.sqrt(2 * np.pi)) * 2 / 255
    assert float(bits[0]) == pytest.approx(-np.log2(mass), rel=2e-3)
