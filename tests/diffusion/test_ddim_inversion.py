"""DDIM to and fro with an eps network that errs a little: the noisiest step must be left out.

The denoiser is the exact one of a finite set of pictures, E[x_0 | x_t] by Bayes. Its eps is off by a fixed field at
each step, as is that of a trained network.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.diffusion.process import make_denoiser
from unclip_jax.diffusion.samplers import ddim_invert, ddim_step, sample
from unclip_jax.diffusion.schedule import make_schedule, respace, table_at

CHAIN = make_schedule("cosine", 1000)
SHAPE = (8, 8, 3)
ERROR = 0.03  # of eps, whose own size is 1


def pictures():
    """Plain squares on plain ground, of colours that lie apart: (24, 8, 8, 3) in [-1, 1]."""
    rng = np.random.default_rng(0)
    data = np.repeat(rng.uniform(-1, 1, (24, 1, 1, 3)), 64, axis=1).reshape(24, *SHAPE)
    data[:, 2:6, 2:6] = rng.uniform(-1, 1, (24, 1, 1, 3))
    return data.astype(np.float32)


DATA = pictures()
KEY = jax.random.key(0)  # of noise that eta = 0 does not add


def network(x_t, t):
    """Gives eps for x_t at original timesteps t (B,)."""
    signal, noise = (table_at(table, t, x_t) for table in (CHAIN.sqrt_alpha_bars, CHAIN.sqrt_beta_bars))
    squares = jnp.sum(jnp.square(x_t[:, None] - signal[:, None] * DATA[None]), axis=(2, 3, 4))
    weights = jax.nn.softmax(-squares / (2 * jnp.square(noise[:, 0, 0])), axis=1)
    x0 = jnp.einsum("bn,nhwc->bhwc", weights, DATA)
    wrong = ERROR * jax.random.normal(jax.random.fold_in(jax.random.key(1), t[0]), (1, *SHAPE))
    return (x_t - signal * x0) / noise + wrong


def decibels(ours, truth):
    error = np.mean(np.square(np.clip(ours, -1, 1) - truth), axis=(1, 2, 3))
    return float(np.mean(10 * np.log10(4 / error)))


@pytest.fixture(scope="module", params=["249/250", "250"])
def chain(request):
    """(spec, denoiser, schedule) of the chain without its noisiest step, and of all of it."""
    schedule = respace(CHAIN, request.param)
    return request.param, make_denoiser(network, schedule, "eps", False), schedule


def test_pictures_come_back(chain):
    spec, denoiser, schedule = chain
    truth = DATA[:6]
    back = sample(denoiser, schedule, ddim_invert(denoiser, schedule, truth), KEY, ddim_step(0.0))
    reached = decibels(np.asarray(back), truth)
    assert reached > 60 if spec == "249/250" else reached < 25  # 79.6 and 18.9 dB


def test_the_first_step_leaves_fresh_noise_at_its_size(chain):
    spec, denoiser, schedule = chain
    x_T, i = jax.random.normal(jax.random.key(5), (6, *SHAPE)), jnp.int32(schedule.num_steps - 1)
    size = float(jnp.std(ddim_step(0.0)(x_T, i, denoiser(x_T, i), schedule, x_T)))
    assert 0.95 < size < 1.05 if spec == "249/250" else size > 3


def test_spec_leaves_the_noisiest_out():
    some, every = respace(CHAIN, "249/250"), respace(CHAIN, "250")
    np.testing.assert_array_equal(some.timesteps, every.timesteps[:-1])
    np.testing.assert_array_equal(respace(CHAIN, "250/250").timesteps, every.timesteps)
    amplified = [chain.sqrt_alpha_bars[-2] / chain.sqrt_alpha_bars[-1] for chain in (every, some)]
    np.testing.assert_allclose(amplified, [126.49, 2.0], rtol=1e-3)
    for spec in ("0/10", "11/10", "1/2000"):
        with pytest.raises(ValueError, match="expected"):
            respace(CHAIN, spec)
