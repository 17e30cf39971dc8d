"""The forward process and what is read from a network's output."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from unclip_jax.diffusion.process import (
    eps_from_x0,
    large_variance,
    make_denoiser,
    posterior_mean_variance,
    predict,
    q_sample,
    q_step,
    x0_from_eps,
)
from unclip_jax.diffusion.schedule import make_schedule, respace

COSINE = make_schedule("cosine", 1000)
CHAIN = respace(COSINE, "10,5,3")
KEYS = jax.random.split(jax.random.key(0), 4)


def normal(key, *shape):
    return jax.random.normal(KEYS[key], shape)


@pytest.mark.parametrize("t", [0, 300, 999])
def test_q_sample_moments(t):
    """Mean sqrt(alpha_bar) x_0, variance 1 - alpha_bar, over many draws for one x_0."""
    x0, noise = jnp.full((2, 100_000), 0.7), normal(0, 2, 100_000)
    x_t = np.asarray(q_sample(COSINE, x0, jnp.array([t, 0]), noise), np.float64)
    alpha_bar = COSINE.alpha_bars[t]
    assert x_t[0].mean() == pytest.approx(np.sqrt(alpha_bar) * 0.7, abs=0.01 * np.sqrt(1 - alpha_bar))
    assert x_t[0].var() == pytest.approx(1 - alpha_bar, rel=0.015)
    assert x_t[1].var() == pytest.approx(1 - COSINE.alpha_bars[0], rel=0.015)


class TestInverses(chex.TestCase):
    """With the schedule as a constant in float64, and as an argument of the program in float32."""

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.product(shape=[(2,), (2, 5), (2, 4, 4, 3)])
    def test_x0_and_eps_are_inverse(self, shape):
        x0, eps, t = normal(0, *shape), normal(1, *shape), jnp.array([0, 600])
        x_t = self.variant(q_sample)(COSINE, x0, t, eps)
        np.testing.assert_allclose(self.variant(x0_from_eps)(COSINE, x_t, t, eps), x0, atol=1e-5)
        np.testing.assert_allclose(self.variant(eps_from_x0)(COSINE, x_t, t, x0), eps, atol=1e-4)


def test_q_step_composes_to_q_sample():
    """Going back towards noise adds the variance that is missing: after t steps it is 1 - alpha_bar_t."""
    x = x0 = jnp.full((1, 50_000), 0.5)
    for i in range(CHAIN.num_steps):
        x = q_step(CHAIN, x, jnp.int32(i), jax.random.normal(jax.random.fold_in(KEYS[0], i), x.shape))
        beta_bar = CHAIN.beta_bars[i]
        assert float(x.var()) == pytest.approx(beta_bar, rel=0.03)
        assert float(x.mean()) == pytest.approx(0.5 * np.sqrt(1 - beta_bar), abs=0.02 * np.sqrt(beta_bar))
    assert x.shape == x0.shape


def test_posterior_is_bayes_rule():
    """Mean and variance of q(x_{t-1} | x_t, x_0) against regression of x_{t-1} on x_t over simulated pairs."""
    i, x0 = 7, 0.3
    n = 200_000
    prev = q_sample(CHAIN, jnp.full((1, n), x0), jnp.int32(i - 1), normal(0, 1, n))
    x_t = np.asarray(q_step(CHAIN, prev, jnp.int32(i), normal(1, 1, n))[0], np.float64)
    slope, intercept = np.polyfit(x_t, np.asarray(prev[0], np.float64), 1)
    residual = np.asarray(prev[0]) - slope * x_t - intercept
    mean, variance, log_variance = posterior_mean_variance(CHAIN, jnp.full((1, 2), x0), jnp.array([[0.0, 1.0]]),
                                                           jnp.int32(i))
    assert float(mean[0, 0]) == pytest.approx(intercept, abs=5e-3)
    assert float(mean[0, 1] - mean[0, 0]) == pytest.approx(slope, abs=5e-3)
    assert float(variance) == pytest.approx(residual.var(), rel=0.02)
    assert float(log_variance) == pytest.approx(np.log(residual.var()), abs=0.02)


@pytest.mark.parametrize("predicts", ["eps", "x0"])
def test_both_parametrisations_recover_both(predicts):
    x0, eps, t = normal(0, 2, 4, 4, 3), normal(1, 2, 4, 4, 3), jnp.array([1, 12])
    x_t = q_sample(CHAIN, x0, t, eps)
    prediction = predict(CHAIN, x0 if predicts == "x0" else eps, x_t, t, predicts, learned_variance=False)
    np.testing.assert_allclose(prediction.x0, x0, atol=1e-4)
    np.testing.assert_allclose(prediction.eps, eps, atol=1e-4)
    assert prediction.log_variance is None


def test_learned_variance_lies_between_posterior_and_beta():
    """v interpolates logarithms, between the bounds of the respaced chain."""
    x_t, t = normal(0, 3, 2, 2, 1), jnp.array([0, 4, 17])
    alpha_bars = COSINE.alpha_bars[np.asarray(CHAIN.timesteps)]
    alpha_bars_prev = np.concatenate([[1.0], alpha_bars[:-1]])
    betas = 1 - alpha_bars / alpha_bars_prev
    tilde = betas * (1 - alpha_bars_prev) / (1 - alpha_bars)
    tilde[0] = tilde[1]
    for v, expected in ((-1.0, np.log(tilde)), (1.0, np.log(betas)), (0.0, 0.5 * (np.log(tilde) + np.log(betas)))):
        output = jnp.concatenate([normal(1, 3, 2, 2, 1), jnp.full((3, 2, 2, 1), v)], -1)
        log_variance = predict(CHAIN, output, x_t, t, "eps", learned_variance=True).log_variance
        expected = np.broadcast_to(expected[np.asarray(t)][:, None, None, None], x_t.shape)
        np.testing.assert_allclose(log_variance, expected, rtol=1e-5)


def test_output_halves_are_prediction_then_variance():
    x_t, t = normal(0, 2, 3, 3, 2), jnp.array([3, 9])
    first, second = normal(1, 2, 3, 3, 2), normal(2, 2, 3, 3, 2)
    both = predict(CHAIN, jnp.concatenate([first, second], -1), x_t, t, "eps", learned_variance=True)
    np.testing.assert_array_equal(both.eps, first)
    other = predict(CHAIN, jnp.concatenate([first, second + 1], -1), x_t, t, "eps", learned_variance=True)
    assert np.all(np.asarray(other.log_variance > both.log_variance))


def test_half_precision_outputs_are_read_as_float32():
    x_t = normal(0, 2, 4)
    prediction = predict(CHAIN, x_t.astype(jnp.bfloat16), x_t, jnp.array([3, 9]), "eps", learned_variance=False)
    assert prediction.x0.dtype == prediction.eps.dtype == jnp.float32


def test_denoiser_tells_the_network_original_timesteps():
    x_t = jnp.zeros((2, 3))

    def network(x, timesteps):
        assert timesteps.shape == (2,) and timesteps.dtype == jnp.int32
        return jnp.broadcast_to(timesteps[:, None], x.shape).astype(jnp.float32)

    denoiser = make_denoiser(network, CHAIN, "x0", learned_variance=False)
    for i, timestep in enumerate(CHAIN.timesteps):
        np.testing.assert_array_equal(denoiser(x_t, jnp.int32(i)).x0, np.full((2, 3), timestep))


def test_large_variance_is_beta():
    denoiser = large_variance(make_denoiser(lambda x, t: x, CHAIN, "x0", learned_variance=False), CHAIN)
    expected = [CHAIN.posterior_variance[1], *CHAIN.betas[1:]]
    ours = [float(jnp.exp(denoiser(jnp.zeros((1, 2)), jnp.int32(i)).log_variance)) for i in range(CHAIN.num_steps)]
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_wrong_outputs_are_refused():
    x_t, t = jnp.zeros((2, 4, 4, 3)), jnp.array([0, 1])
    with pytest.raises(ValueError, match=r"expected \(2, 4, 4, 6\) with learned_variance=True"):
        predict(CHAIN, x_t, x_t, t, "eps", learned_variance=True)
    with pytest.raises(ValueError, match="expected one of eps, x0"):
        predict(CHAIN, x_t, x_t, t, "v", learned_variance=False)
