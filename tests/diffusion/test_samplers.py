"""Samplers against closed forms: Gaussian data, whose best denoiser is linear, and denoisers that know the answer."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.diffusion.guidance import classifier_free, clip_x0
from unclip_jax.diffusion.process import Prediction, eps_from_x0, make_denoiser, q_sample
from unclip_jax.diffusion.samplers import (
    ddim_invert,
    ddim_step,
    ddpm_step,
    dpm_solver_step,
    sample,
    sample_part,
)
from unclip_jax.diffusion.schedule import make_schedule, respace, table_at

COSINE, LINEAR = make_schedule("cosine", 1000), make_schedule("linear", 1000)
KEY = jax.random.key(0)
V = 0.3  # variance of the Gaussian data


def oracle(schedule, x0):
    """A denoiser that knows x_0."""
    return lambda x_t, i: Prediction(x0, eps_from_x0(schedule, x_t, i, x0), None)


def gaussian(schedule, exact_variance):
    """The best denoiser for data N(0, V I): E[x_0 | x_t] = sqrt(alpha_bar) V x_t / (alpha_bar V + beta_bar)."""

    def denoise(x_t, i):
        alpha_bar, beta_bar = table_at(schedule.alpha_bars, i, x_t), table_at(schedule.beta_bars, i, x_t)
        total = alpha_bar * V + beta_bar
        x0 = jnp.sqrt(alpha_bar) * V / total * x_t
        # Var[x_{t-1} | x_t] = beta-tilde + weight^2 Var[x_0 | x_t]: the law of total variance.
        weight = table_at(schedule.posterior_x0_weight, i, x_t)
        variance = table_at(schedule.posterior_variance, i, x_t) + weight**2 * V * beta_bar / total
        return Prediction(x0, eps_from_x0(schedule, x_t, i, x0), jnp.log(variance) if exact_variance else None)

    return denoise


def start(schedule, shape):
    """x_T of the Gaussian data."""
    scale = np.sqrt(schedule.alpha_bars[-1] * V + schedule.beta_bars[-1])
    return jnp.float32(scale) * jax.random.normal(jax.random.fold_in(KEY, 1), shape)


@pytest.mark.parametrize("schedule", [respace(COSINE, "5"), respace(COSINE, "64"), respace(LINEAR, "fast27")])
def test_gaussian_data_is_sampled_exactly_with_the_exact_variance(schedule):
    """Any number of steps: the reverse steps of Gaussian data are Gaussian."""
    x = np.asarray(sample(gaussian(schedule, True), schedule, start(schedule, (100, 1000)), KEY), np.float64)
    assert x.mean() == pytest.approx(0, abs=0.01)
    assert x.var() == pytest.approx(V, rel=0.015)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_gaussian_data_with_a_thousand_steps(eta):
    x_T = start(COSINE, (10, 1000))
    x = np.asarray(sample(gaussian(COSINE, False), COSINE, x_T, KEY, ddim_step(eta)), np.float64)
    assert x.var() == pytest.approx(V, rel=0.03)
    if eta == 0:  # The probability flow of Gaussian data only rescales.
        np.testing.assert_allclose(x, np.asarray(x_T) * np.sqrt(V / np.asarray(x_T).var()), atol=0.03)


@pytest.mark.parametrize("step", [ddpm_step, ddim_step(0.0), ddim_step(0.8), ddim_step(1.0)])
@pytest.mark.parametrize("spec", ["1", "2", "5", "10", "27", "fast27", "ddim25", "1000"])
def test_an_oracle_is_obeyed(spec, step):
    """Every chain, of one step or of T, ends in the predicted x_0 itself."""
    schedule = respace(COSINE, spec)
    x0 = jax.random.uniform(KEY, (2, 5), minval=-1.0, maxval=1.0)
    x = sample(oracle(schedule, x0), schedule, jax.random.normal(jax.random.fold_in(KEY, 2), (2, 5)), KEY, step)
    np.testing.assert_allclose(x, x0, atol=1e-6)


def test_ddim_step_keeps_an_exact_trajectory():
    """With eta = 0 and the true x_0, x_t = sqrt(alpha_bar) x_0 + sqrt(beta_bar) eps for one eps at all t."""
    x0, eps = jax.random.normal(KEY, (1, 50)), jax.random.normal(jax.random.fold_in(KEY, 1), (1, 50))
    schedule = respace(LINEAR, "10,10,3,2,2")
    for i in range(schedule.num_steps - 1, 0, -1):
        i = jnp.int32(i)
        x_t = q_sample(schedule, x0, i, eps)
        x_prev = ddim_step(0.0)(x_t, i, oracle(schedule, x0)(x_t, i), schedule, jnp.zeros_like(x_t))
        np.testing.assert_allclose(x_prev, q_sample(schedule, x0, i - 1, eps), atol=2e-5)


class TestSteps(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_ddim_with_eta_one_is_ddpm(self):
        """DDIM paper, section 4.1: the posterior q(x_{t-1} | x_t, x_0) itself."""
        schedule = respace(COSINE, "20")
        x_t, noise, x0 = (jax.random.normal(jax.random.fold_in(KEY, k), (1, 50)) for k in range(3))
        ddim, ddpm = self.variant(ddim_step(1.0)), self.variant(ddpm_step)
        for i in map(jnp.int32, range(20)):
            arguments = x_t, i, oracle(schedule, x0)(x_t, i), schedule, noise
            np.testing.assert_allclose(ddim(*arguments), ddpm(*arguments), atol=2e-5)


@pytest.mark.parametrize("spec", ["7", "fast27", "ddim25"])
def test_steps_follow_the_table(spec):
    """The network is told the kept timesteps, noisiest first, whatever the spacing."""
    schedule = respace(COSINE, spec)

    def remember(x_t, i, prediction, schedule, noise):
        return jnp.roll(x_t, 1, axis=-1).at[:, 0].set(prediction.x0[:, 0])

    def network(x, timesteps):
        return jnp.broadcast_to(timesteps[:, None], x.shape).astype(jnp.float32)

    denoiser = make_denoiser(network, schedule, "x0", learned_variance=False)
    told = sample(denoiser, schedule, jnp.zeros((1, schedule.num_steps)), KEY, remember)[0]
    np.testing.assert_array_equal(told, schedule.timesteps)


def test_ancestral_noise_has_the_predicted_variance():
    schedule = respace(COSINE, "10")
    x, noise = jnp.zeros((1, 4)), jnp.ones((1, 4))
    prediction = Prediction(x, x, jnp.full((1, 4), np.log(0.25), jnp.float32))
    np.testing.assert_allclose(ddpm_step(x, jnp.int32(3), prediction, schedule, noise), 0.5, rtol=1e-6)
    np.testing.assert_array_equal(ddpm_step(x, jnp.int32(0), prediction, schedule, noise), x)
    fixed = ddpm_step(x, jnp.int32(3), prediction._replace(log_variance=None), schedule, noise)
    np.testing.assert_allclose(fixed, np.sqrt(schedule.posterior_variance[3]), rtol=1e-5)


def test_noise_depends_on_key_and_step_alone():
    schedule = respace(COSINE, "6")
    denoiser, x_T = gaussian(schedule, True), start(schedule, (2, 3))
    drawn = jnp.stack([jax.random.normal(jax.random.fold_in(KEY, i), x_T.shape) for i in range(5, -1, -1)])
    given = sample(denoiser, schedule, x_T, None, noise=drawn)
    np.testing.assert_allclose(sample(denoiser, schedule, x_T, KEY), given, atol=1e-6)
    assert np.all(np.abs(np.asarray(sample(denoiser, schedule, x_T, jax.random.key(1)) - given)) > 1e-3)
    with pytest.raises(ValueError, match=r"noise of shape \(5, 2, 3\)"):
        sample(denoiser, schedule, x_T, None, noise=drawn[1:])


def test_inversion_is_undone_by_sampling():
    schedule = respace(COSINE, "250")
    denoiser = gaussian(schedule, False)
    x_0 = jnp.sqrt(jnp.float32(V)) * jax.random.normal(KEY, (4, 100))
    x_T = ddim_invert(denoiser, schedule, x_0)
    assert float(x_T.var()) == pytest.approx(float(x_0.var()) / V, rel=0.02)
    back = sample(denoiser, schedule, x_T, KEY, ddim_step(0.0))
    np.testing.assert_allclose(back, x_0, atol=0.01 * float(jnp.max(jnp.abs(x_0))), rtol=0.01)
    with pytest.raises(ValueError, match="at least 2 steps"):
        ddim_invert(denoiser, respace(COSINE, "1"), x_0)


def test_inversion_stops_where_sampling_starts():
    """All steps but the last: with a known x_0 the result has the noise level of the last step."""
    schedule = respace(LINEAR, "ddim10")
    x0, eps = jax.random.normal(KEY, (1, 50)), jax.random.normal(jax.random.fold_in(KEY, 1), (1, 50))
    state = q_sample(schedule, x0, jnp.int32(0), eps)
    expected = q_sample(schedule, x0, jnp.int32(9), eps)
    np.testing.assert_allclose(ddim_invert(oracle(schedule, x0), schedule, state), expected, atol=5e-4)


def test_one_program_serves_all_settings():
    """Keys, guidance scales, eta, clipping and tables of one length are arguments: nothing is compiled twice."""
    traces = []

    @jax.jit
    def run(schedule, x_T, key, scale, eta, limit):
        traces.append(1)
        denoiser = make_denoiser(lambda x, t: 0.5 * x, schedule, "x0", learned_variance=False)
        return sample(clip_x0(classifier_free(denoiser, scale), schedule, limit), schedule, x_T, key, ddim_step(eta))

    x_T = jnp.ones((1, 3))
    outputs = [run(schedule, x_T, jax.random.key(seed), scale, eta, 1.0)
               for seed, (scale, eta) in enumerate([(1.0, 0.0), (2.0, 0.5), (4.0, 1.0)])
               for schedule in (respace(COSINE, "10"), respace(LINEAR, "4,3,3"))]
    assert len(traces) == 1 and all(np.all(np.isfinite(output)) for output in outputs)


@pytest.mark.parametrize(("step", "looks_back"), [(ddpm_step, False), (ddim_step(0.5), False), (dpm_solver_step, True)])
@pytest.mark.parametrize("at_once", [1, 3])
def test_steps_taken_in_parts_are_the_same(step, looks_back, at_once):
    """By one program for all parts; below each state is the x0 that the last step was led by."""
    schedule = respace(make_schedule("cosine", 100), "7")
    x_T, seen = jax.random.normal(KEY, (2, 5)), []

    def denoiser(x, i):
        x0 = jnp.tanh(x)
        return Prediction(x0, eps_from_x0(schedule, x, i, x0), None)

    @jax.jit
    def part(state, first, count):
        seen.append(1)
        return sample_part(denoiser, schedule, x_T, KEY, step, state, first, count, looks_back)

    state = jnp.full((4, 5), jnp.nan, jnp.float32)  # what the first part gets is not read
    for first in range(6, -1, -at_once):
        before, state = state, part(state, jnp.int32(first), jnp.int32(min(at_once, first + 1)))
    expected = jax.jit(lambda: sample(denoiser, schedule, x_T, KEY, step, looks_back=looks_back))()
    np.testing.assert_allclose(state[:2], expected, atol=1e-6)  # another program rounds otherwise
    assert len(seen) == 1
    # The last part is of one step, which starts from the x_t before.
    np.testing.assert_allclose(state[2:], np.tanh(before[:2]), rtol=1e-6)
