"""Guidance: its two ends, its invariants, and Bayes' rule on Gaussian data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.diffusion.guidance import classifier_free, clip_x0, condition_eps, condition_mean, known_pixels
from unclip_jax.diffusion.process import Prediction, make_denoiser, q_sample
from unclip_jax.diffusion.samplers import ddim_step, ddpm_step, sample
from unclip_jax.diffusion.schedule import make_schedule, respace

CHAIN = respace(make_schedule("cosine", 1000), "12")
KEY = jax.random.key(0)
X = jax.random.normal(KEY, (2, 4, 4, 4))
I = jnp.int32(7)


def branches(predicts="eps"):
    """A denoiser for 2B rows whose first half differs from its second in every channel and in the variance."""

    def network(x, timesteps):
        b = x.shape[0] // 2
        tilt = jnp.concatenate([jnp.full((b, 1, 1, 1), 0.3), jnp.full((b, 1, 1, 1), -0.2)])
        return jnp.concatenate([0.5 * x + tilt, jnp.broadcast_to(tilt, x.shape)], -1)

    return make_denoiser(network, CHAIN, predicts, learned_variance=True)


def halves(predicts="eps"):
    both = branches(predicts)(jnp.concatenate([X, X]), I)
    parts = both.x0, both.eps, both.log_variance
    return Prediction(*(part[:2] for part in parts)), Prediction(*(part[2:] for part in parts))


@pytest.mark.parametrize("predicts", ["eps", "x0"])
def test_scale_one_is_conditional_and_zero_unconditional(predicts):
    """s = 1, not w = 0, is plain conditional sampling."""
    conditional, unconditional = halves(predicts)
    for scale, expected in ((1.0, conditional), (0.0, unconditional)):
        guided = classifier_free(branches(predicts), scale)(X, I)
        np.testing.assert_allclose(guided.x0, expected.x0, rtol=1e-6)
        np.testing.assert_allclose(guided.eps, expected.eps, rtol=1e-6)


@pytest.mark.parametrize("predicts", ["eps", "x0"])
def test_guidance_moves_every_channel_and_leaves_the_variance(predicts):
    """All channels of the mean are guided; the variance is the conditional branch's."""
    conditional, unconditional = halves(predicts)
    guided = classifier_free(branches(predicts), jnp.float32(3.0))(X, I)
    for ours, c, u in zip(guided[:2], conditional[:2], unconditional[:2], strict=True):
        assert np.all(np.asarray(c != u))
        np.testing.assert_allclose(ours, u + 3.0 * (c - u), atol=1e-5)
    np.testing.assert_array_equal(guided.log_variance, conditional.log_variance)
    np.testing.assert_allclose(q_sample(CHAIN, guided.x0, I, guided.eps), X, atol=1e-5)


def test_guidance_without_learned_variance():
    denoiser = make_denoiser(lambda x, t: 0.5 * x, CHAIN, "x0", learned_variance=False)
    guided = classifier_free(denoiser, 2.0)(X, I)
    assert guided.log_variance is None
    np.testing.assert_allclose(guided.x0, 0.5 * X, rtol=1e-6)


@pytest.mark.parametrize("limit", [1.0, 0.25])
def test_clipping_keeps_x0_and_eps_consistent(limit):
    """x0 ends within the limits, untouched where it was, and eps is derived after clipping."""
    plain = make_denoiser(lambda x, t: 0.6 * x, CHAIN, "x0", learned_variance=False)
    clipped = clip_x0(plain, CHAIN, limit)(X, I)
    assert float(jnp.max(jnp.abs(0.6 * X))) > 1
    np.testing.assert_allclose(clipped.x0, np.clip(0.6 * np.asarray(X), -limit, limit), rtol=1e-6)
    np.testing.assert_allclose(q_sample(CHAIN, clipped.x0, I, clipped.eps), X, atol=1e-5)


def test_known_pixels_end_as_they_were_given():
    source = jax.random.uniform(KEY, X.shape, minval=-1.0, maxval=1.0)
    known = jnp.zeros((1, 4, 4, 1), bool).at[:, :2].set(True)
    plain = make_denoiser(lambda x, t: 0.6 * x, CHAIN, "x0", learned_variance=False)
    denoiser = known_pixels(plain, CHAIN, source, known)
    prediction = denoiser(X, I)
    np.testing.assert_array_equal(prediction.x0[:, 2:], (0.6 * X)[:, 2:])
    np.testing.assert_allclose(q_sample(CHAIN, prediction.x0, I, prediction.eps), X, atol=1e-5)
    for step in (ddpm_step, ddim_step(0.0)):
        ours = sample(denoiser, CHAIN, X, KEY, step)
        np.testing.assert_allclose(ours[:, :2], source[:, :2], atol=1e-6)
        assert float(jnp.max(jnp.abs(ours[:, 2:] - source[:, 2:]))) > 0.1


def gaussian_condition(v, noise_variance, observed):
    """For data N(0, v) and y = x_0 + N(0, noise_variance): the denoiser of x_0 | x_t, the gradient of log p(y | x_t),
    and the (mean, variance) of x_0 | x_t, y as functions of (x_t, i)."""

    def moments(x, i):
        alpha_bar, beta_bar = jnp.float32(CHAIN.alpha_bars[i]), jnp.float32(CHAIN.beta_bars[i])
        total = alpha_bar * v + beta_bar
        slope = jnp.sqrt(alpha_bar) * v / total
        return slope, slope * x, v * beta_bar / total

    def network(x, timesteps):
        return moments(x, int(np.flatnonzero(CHAIN.timesteps == int(timesteps[0]))[0]))[1]

    def gradient(x, timesteps):
        slope, mean, variance = moments(x, int(np.flatnonzero(CHAIN.timesteps == int(timesteps[0]))[0]))
        return slope * (observed - mean) / (variance + noise_variance)

    def posterior_mean(x, i):
        _, mean, variance = moments(x, i)
        return mean + variance / (variance + noise_variance) * (observed - mean)

    return make_denoiser(network, CHAIN, "x0", learned_variance=False), gradient, posterior_mean


@pytest.mark.parametrize("i", [0, 4, 11])
def test_conditioning_eps_is_bayes_rule(i):
    """With the exact gradient, the guided x0 is E[x_0 | x_t, y]; the gradient is told the original timesteps."""
    denoiser, gradient, posterior_mean = gaussian_condition(0.3, 0.1, observed=0.8)
    guided = condition_eps(denoiser, CHAIN, gradient, 1.0)(X, jnp.int32(i))
    np.testing.assert_allclose(guided.x0, posterior_mean(X, i), atol=2e-3)
    np.testing.assert_allclose(q_sample(CHAIN, guided.x0, jnp.int32(i), guided.eps), X, atol=1e-5)


def test_conditioning_the_mean_shifts_by_scale_times_variance():
    told = []

    def gradient(x, timesteps):
        told.append(timesteps)
        return jnp.cos(x)

    noise = jax.random.normal(jax.random.fold_in(KEY, 1), X.shape)
    learned = Prediction(X, X, jnp.full(X.shape, np.log(0.04), jnp.float32))
    for prediction, variance in ((learned, 0.04), (learned._replace(log_variance=None), CHAIN.posterior_variance[7])):
        plain = ddpm_step(X, I, prediction, CHAIN, noise)
        guided = condition_mean(ddpm_step, gradient, 3.0)(X, I, prediction, CHAIN, noise)
        np.testing.assert_allclose(guided - plain, 3.0 * variance * np.cos(X), atol=1e-5)
    assert all(t.shape == (2,) and np.all(t == CHAIN.timesteps[7]) for t in told)
