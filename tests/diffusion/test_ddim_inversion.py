"""DDIM to and fro with an eps network that errs a little: the noisiest step must be left out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import CHAIN, DATA, SHAPE, decibels, network

from unclip_jax.diffusion.process import make_denoiser
from unclip_jax.diffusion.samplers import ddim_invert, ddim_step, sample
from unclip_jax.diffusion.schedule import respace

KEY = jax.random.key(0)  # of noise that eta = 0 does not add


@pytest.fixture(scope="module", params=["249/250", "250"])
def chain(request):
    """(spec, denoiser, schedule) of the chain without its noisiest step, and of all of it."""
    schedule = respace(CHAIN, request.param)
    return request.param, make_denoiser(network, schedule, "eps", False), schedule


def test_pictures_come_back(chain):
    spec, denoiser, schedule = chain
    truth = DATA[:6]
    back = sample(denoiser, schedule, ddim_invert(denoiser, schedule, truth), KEY, ddim_step(0.0))
    reached = float(np.mean(decibels(np.asarray(back), truth)))
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
