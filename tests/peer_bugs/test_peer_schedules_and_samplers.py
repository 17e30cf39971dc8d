"""What other code bases got wrong about schedules, samplers and the loss. Tables here are float64, from the papers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shrink import small_config

from unclip_jax.diffusion.guidance import classifier_free, clip_x0, known_states
from unclip_jax.diffusion.losses import training_loss
from unclip_jax.diffusion.process import Prediction, make_denoiser, predict, q_sample, q_step
from unclip_jax.diffusion.samplers import ddim_step, ddpm_step, sample
from unclip_jax.diffusion.schedule import make_schedule, respace
from unclip_jax.stages.base import draw
from unclip_jax.stages.conditions import Conditions

T = 1000
KEY = jax.random.key(0)


def cosine_alpha_bars(length):
    """Improved DDPM, eq. 17, whose last beta is held at 0.999."""
    f = [math.cos((k / length + 0.008) / 1.008 * math.pi / 2) ** 2 for k in range(length + 1)]
    alpha_bars = np.array(f[1:]) / f[0]
    alpha_bars[-1] = alpha_bars[-2] * 0.001
    return alpha_bars


ALPHA_BARS = cosine_alpha_bars(T)
COSINE = make_schedule("cosine", T)


def told(steps, sampler="ddpm", x0=lambda t: jnp.float32(0)):
    """The timesteps that a network is told while one number is drawn, and that number; it predicts x0(t)."""
    config = small_config("prior_diffusion").unlock()
    config.sampling.update(dict(steps=steps, sampler=sampler))
    seen = []

    def network(x_t, t):
        jax.debug.callback(lambda t: seen.append(int(t)), t[0], ordered=True)
        return jnp.full_like(x_t, x0(t[0]))

    drawn = jax.jit(lambda key: draw(config, network, (1, 1), Conditions(), key))(KEY)
    jax.effects_barrier()
    return seen, float(drawn[0, 0])


@pytest.mark.parametrize("length", [50, 1000, 4000])
def test_cosine_schedule_divides_by_the_number_of_its_steps(length):
    """DALLE2-pytorch (fixed in ddde8ca) divided by the number of grid points instead, one more than there are steps."""
    np.testing.assert_allclose(make_schedule("cosine", length).alpha_bars, cosine_alpha_bars(length), rtol=1e-9)


def test_linear_schedule_runs_from_its_first_beta_to_its_last():
    """DALLE2-pytorch!141: a schedule between transformed ends (squares for square roots) does not reach the ends."""
    betas = make_schedule("linear", T).betas
    np.testing.assert_allclose(betas[[0, -1]], [1e-4, 0.02], rtol=1e-12)
    np.testing.assert_allclose(betas, [1e-4 + k * (0.02 - 1e-4) / 999 for k in range(T)], rtol=1e-9)


@pytest.mark.parametrize("length", [25, 100, 250, 4000])
def test_linear_schedule_of_another_length_still_ends_in_noise(length):
    """diffusers!12341: betas made for 1000 steps leave much of the picture standing after fewer."""
    assert make_schedule("linear", length).alpha_bars[-1] < 1e-3


def ddim_by_hand(kept, x, x0_of):
    """DDIM with eta 0 over the kept timesteps, in float64: every pair from the table, the last one ending at x_0."""
    for here, there in zip(kept[::-1], [*kept[:-1][::-1], None], strict=True):
        a, b = ALPHA_BARS[here], 1.0 if there is None else ALPHA_BARS[there]
        x0 = x0_of(x)
        x = math.sqrt(b) * x0 + math.sqrt(1 - b) * (x - math.sqrt(a) * x0) / math.sqrt(1 - a)
    return x


def ddim(spec, x):
    chain = respace(COSINE, spec)
    denoiser = make_denoiser(lambda x_t, t: 0.3 * x_t, chain, "x0", learned_variance=False)
    return float(sample(denoiser, chain, jnp.full((1, 1), x, jnp.float32), KEY, ddim_step(0.0))[0, 0])


def test_ddim_pairs_each_step_with_the_next_less_noisy_one():
    """denoising-diffusion-pytorch#81: tables of the previous step, indexed once more as previous; a pair (0, 0)."""
    kept = [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
    assert ddim("10", 0.7) == pytest.approx(ddim_by_hand(kept, 0.7, lambda x: 0.3 * x), rel=1e-4)


def test_ddim_takes_uneven_steps_from_the_table():
    """diffusers#11347, #12633: t - T // N is not the step before t where the spacing is not even."""
    kept = [0, 499, 500, 583, 666, 749, 832, 916, 999]
    assert ddim("2,7", 0.7) == pytest.approx(ddim_by_hand(kept, 0.7, lambda x: 0.3 * x), rel=1e-4)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_sampling_starts_at_the_last_timestep_for_every_step_count(sampler):
    """DALLE2-pytorch took pure noise for the state at t = 909 of ten steps; so did stable-diffusion#686."""
    for steps in (1, 5, 10):
        timesteps, _ = told(str(steps), sampler)
        assert len(timesteps) == steps and timesteps[0] == T - 1
        assert steps == 1 or timesteps[-1] == 0
    for steps in (*range(1, 30), 50, 64, 100, 250, 999, T):
        assert respace(COSINE, str(steps)).timesteps[-1] == T - 1


def test_one_step_is_a_chain_and_none_is_an_error():
    """diffusers#14586: the unCLIP scheduler divided by zero for one step and returned an empty chain for none."""
    assert told("1", "ddpm", lambda t: 0.4) == ([T - 1], pytest.approx(0.4))
    assert told("1", "ddim", lambda t: 0.4) == ([T - 1], pytest.approx(0.4))
    with pytest.raises(ValueError, match="not 0"):
        told("0")


def overshooting(chain):
    """Predicts x0 far outside of what pictures may be, and within it at the last channel."""
    network = lambda x_t, t: jnp.array([[3.0, -2.0, 0.5]]) + 0 * x_t  # noqa: E731
    return clip_x0(make_denoiser(network, chain, "x0", learned_variance=False), chain, 1.0)


@pytest.mark.parametrize("steps", [7, T])
def test_noise_is_derived_after_clipping_and_sampling_ends_in_x0(steps):
    """DALLE2-pytorch 0d82dff: eps of an x0 not yet clipped; latent-diffusion#136: as many steps as timesteps crash."""
    chain = respace(COSINE, str(steps))
    x_t = jnp.array([[0.9, -0.1, 0.2]])
    denoise = jax.jit(overshooting(chain))
    for i in range(0, steps, max(1, steps // 7)):
        said = denoise(x_t, jnp.int32(i))
        a = ALPHA_BARS[chain.timesteps[i]]
        back = math.sqrt(a) * np.asarray(said.x0, np.float64) + math.sqrt(1 - a) * np.asarray(said.eps, np.float64)
        np.testing.assert_allclose(back, x_t, atol=1e-5)
    for step in (ddpm_step, ddim_step(0.0)):
        drawn = sample(overshooting(chain), chain, x_t, KEY, step)
        np.testing.assert_allclose(drawn, [[1.0, -1.0, 0.5]], atol=1e-6)


def test_clipping_keeps_what_is_inside_and_bounds_what_is_outside():
    """diffusers!3003: the two bounds of the clamp swapped, which makes every value one of them."""
    chain = respace(COSINE, "3")
    x0 = np.linspace(-4, 4, 17, dtype=np.float32)[None]
    clipped = clip_x0(lambda x_t, i: Prediction(jnp.asarray(x0), x_t, None), chain, 1.5)(jnp.zeros((1, 17)), 1).x0
    inside = np.abs(x0) <= 1.5
    np.testing.assert_array_equal(np.asarray(clipped)[inside], x0[inside])
    np.testing.assert_array_equal(np.asarray(clipped)[~inside], 1.5 * np.sign(x0[~inside]))


def test_a_step_back_towards_noise_adds_all_the_variance_that_is_missing():
    """DALLE2-pytorch's RePaint added the difference of two standard deviations: 0.0022 for 0.0563 at t = 501."""
    one, none = jnp.ones((1, 1)), jnp.zeros((1, 1))
    for t in (1, 251, 501, 998):
        signal, noise = (float(q_step(COSINE, *pair)[0, 0]) for pair in ((one, t, none), (none, t, one)))
        before, after = 1 - ALPHA_BARS[t - 1], 1 - ALPHA_BARS[t]
        assert signal**2 * before + noise**2 == pytest.approx(after, rel=1e-5)
        assert noise**2 == pytest.approx(1 - ALPHA_BARS[t] / ALPHA_BARS[t - 1], rel=1e-5)
        put_back = known_states(ddpm_step, none, True)(one, t, Prediction(one, one, None), COSINE, one)
        assert float(put_back[0, 0]) ** 2 == pytest.approx(before, rel=1e-5)
    assert float(q_step(COSINE, none, 501, one)[0, 0]) == pytest.approx(0.0563, abs=5e-5)


def test_noising_has_the_signal_and_the_spread_of_its_timestep():
    """diffusers!1661: `add_noise` copied between schedulers with the wrong coefficients."""
    t = jnp.array([0, 37, 500, 999])
    one, none = jnp.ones((4, 2, 2, 1)), jnp.zeros((4, 2, 2, 1))
    a = np.broadcast_to(ALPHA_BARS[np.asarray(t)][:, None, None, None], one.shape)
    np.testing.assert_allclose(q_sample(COSINE, one, t, none), np.sqrt(a), rtol=1e-6)
    np.testing.assert_allclose(q_sample(COSINE, none, t, one), np.sqrt(1 - a), rtol=1e-6)


def learned(v, t, chain):
    output = jnp.concatenate([jnp.zeros((1, 1, 1, 1)), jnp.full((1, 1, 1, 1), v, jnp.float32)], axis=-1)
    return float(predict(chain, output, jnp.zeros((1, 1, 1, 1)), jnp.array([t]), "eps", True).log_variance.squeeze())


def test_learned_variance_mixes_logarithms_of_the_steps_taken():
    """diffusers!2090, !3006: mixed the variances, not their logarithms; took the beta of the chain not respaced."""
    kept = [0, 71, 143, 214, 285, 357, 428, 500, 571, 642, 714, 785, 856, 928, 999]
    a = ALPHA_BARS[kept]
    for i in (1, 7, 14):
        beta = 1 - a[i] / a[i - 1]
        low, high = math.log(beta * (1 - a[i - 1]) / (1 - a[i])), math.log(beta)
        for v in (-1.0, -0.3, 0.0, 1.0):
            expected = low + (v + 1) / 2 * (high - low)
            assert learned(v, i, respace(COSINE, "15")) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("predicts", ["eps", "x0"])
def test_variational_term_reads_the_objective_and_trains_the_variance_alone(predicts):
    """DALLE2-pytorch#138: the bound took any output for eps; without a held mean its gradient drowns the other's."""
    rng = np.random.default_rng(0)
    x0, noise = rng.uniform(-1, 1, (2, 4, 4, 3)).astype("f"), rng.normal(size=(2, 4, 4, 3)).astype("f")
    t = np.array([40, 700])
    x_t = q_sample(COSINE, x0, t, noise)
    truth = noise if predicts == "eps" else x0

    @jax.jit
    def loss(mean, v):
        output = jnp.concatenate([mean, jnp.broadcast_to(v, mean.shape)], axis=-1)
        return training_loss(COSINE, output, x0, x_t, noise, t, predicts, True, None)

    a, before = ALPHA_BARS[t], ALPHA_BARS[t - 1]
    ratio = (1 - before) / (1 - a)  # of the posterior's variance to beta
    for v, kl in ((-1.0, 0 * ratio), (1.0, 0.5 * (ratio - 1 - np.log(ratio)) / np.log(2))):
        np.testing.assert_allclose(loss(truth, jnp.float32(v))[1]["vb"], kl, rtol=2e-2, atol=1e-6)
    gradient = jax.jit(jax.grad(lambda mean: jnp.sum(loss(mean, jnp.float32(0.3))[0])))(truth + np.float32(0.1))
    np.testing.assert_allclose(gradient, 2 * 0.1 / 48, rtol=1e-4)


def two_branches(x_t, i):
    """For 2B rows: 1 in every channel of the first B, 0 in the rest; log variances 5 and -5."""
    mine = (jnp.arange(len(x_t)) < len(x_t) // 2).astype(jnp.float32)[:, None, None, None]
    rows = jnp.broadcast_to(mine, x_t.shape)
    return Prediction(rows, 2 * rows, 10 * rows - 5)


def test_guidance_moves_every_channel_and_takes_the_conditional_variance():
    """DiT#41: guidance of the first three of four channels, copied from code for RGB."""
    guided = classifier_free(two_branches, 3.0)(jnp.zeros((2, 2, 2, 4)), 0)
    np.testing.assert_array_equal(guided.x0, np.full((2, 2, 2, 4), 3.0))
    np.testing.assert_array_equal(guided.eps, np.full((2, 2, 2, 4), 6.0))
    np.testing.assert_array_equal(guided.log_variance, np.full((2, 2, 2, 4), 5.0))


def test_guidance_scale_one_is_conditional_and_zero_is_unconditional():
    """stable-dreamfusion#32: the scales s and w = s - 1 of two papers mixed up."""
    for scale in (0.0, 1.0):
        guided = classifier_free(two_branches, scale)(jnp.zeros((1, 1, 1, 3)), 0)
        np.testing.assert_array_equal(guided.x0, np.full((1, 1, 1, 3), scale))
