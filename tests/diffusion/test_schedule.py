"""Schedules and respacing: published values, identities, and what other code bases got wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.diffusion.schedule import NoiseSchedule, make_schedule, respace, respacing, table_at

COSINE, LINEAR = make_schedule("cosine", 1000), make_schedule("linear", 1000)
FAST27 = [0, 22, 44, 66, 88, 111, 133, 155, 177, 199, 200, 222, 244, 266, 288, 311, 333, 355, 377, 399, 400, 500, 599,
          600, 799, 800, 997]


def test_cosine_values():
    """The number of steps is the length of the chain. Values from guided-diffusion's own tables."""
    expected = {0: 4.1284224822e-5, 1: 4.6141752737e-5, 499: 3.1458862305e-3, 998: 0.7499993929, 999: 0.999}
    np.testing.assert_allclose(COSINE.betas[list(expected)], list(expected.values()), rtol=1e-8)
    assert np.sum(COSINE.betas == 0.999) == 1
    np.testing.assert_allclose(COSINE.alpha_bars[[249, 499, 749]], [0.84701216, 0.49384359, 0.14427210], rtol=1e-7)
    np.testing.assert_allclose(COSINE.alpha_bars[999], 2.4287669e-9, rtol=1e-6)
    assert COSINE.posterior_log_variance[0] == pytest.approx(-10.734083, abs=1e-6)


def test_linear_values():
    """The ends are beta_0 and beta_{T-1} themselves. Values from guided-diffusion's own tables."""
    expected = {0: 1e-4, 1: 1.1991991992e-4, 499: 1.0040040040e-2, 998: 1.9980080080e-2, 999: 0.02}
    np.testing.assert_allclose(LINEAR.betas[list(expected)], list(expected.values()), rtol=1e-9)
    np.testing.assert_allclose(LINEAR.alpha_bars[[249, 499, 749, 999]],
                               [0.52408537, 0.07858724, 3.35055e-3, 4.0358298e-5], rtol=2e-6)
    assert LINEAR.posterior_log_variance[0] == pytest.approx(-9.816725, abs=1e-6)


@pytest.mark.parametrize("name", ["cosine", "linear"])
@pytest.mark.parametrize("length", [50, 100, 4000])
def test_chains_of_any_length_end_in_noise(name, length):
    """Linear betas are scaled with the length of the chain."""
    assert make_schedule(name, length).alpha_bars[-1] < 1e-3


@pytest.mark.parametrize("schedule", [COSINE, LINEAR, respace(COSINE, "64"), respace(LINEAR, "fast27")])
def test_tables_agree_with_bayes(schedule):
    """q(x_{t-1} | x_t, x_0) by multiplying the two Gaussians q(x_t | x_{t-1}) and q(x_{t-1} | x_0)."""
    s = schedule
    np.testing.assert_allclose(np.cumprod(1 - s.betas), s.alpha_bars, rtol=1e-9)
    assert s.alpha_bars_prev[0] == 1 and s.alpha_bars_next[-1] == 0 and s.posterior_variance[0] == 0
    np.testing.assert_array_equal(s.alpha_bars_prev[1:], s.alpha_bars[:-1])
    np.testing.assert_array_equal(s.alpha_bars_next[:-1], s.alpha_bars[1:])
    precision = (1 - s.betas[1:]) / s.betas[1:] + 1 / s.beta_bars_prev[1:]
    np.testing.assert_allclose(s.posterior_variance[1:], 1 / precision, rtol=1e-8)
    np.testing.assert_allclose(s.posterior_log_variance[1:], -np.log(precision), rtol=1e-7)
    np.testing.assert_allclose(
        s.posterior_x_t_weight[1:], np.sqrt(1 - s.betas[1:]) / s.betas[1:] / precision, rtol=1e-8)
    np.testing.assert_allclose(
        s.posterior_x0_weight[1:], np.sqrt(s.alpha_bars_prev[1:]) / s.beta_bars_prev[1:] / precision, rtol=1e-8)
    assert s.posterior_x0_weight[0] == pytest.approx(1) and s.posterior_x_t_weight[0] == 0


@pytest.mark.parametrize(("spec", "kept"), [
    ("fast27", FAST27),
    ("10,10,3,2,2", [*FAST27[:-1], 999]),
    ("15", [0, 71, 143, 214, 285, 357, 428, 500, 571, 642, 714, 785, 856, 928, 999]),
    ("7", [0, 166, 333, 500, 666, 832, 999]),
    ("ddim15", list(range(0, 939, 67))),
    ("ddim38", list(range(0, 1000, 27))),  # 999 is a multiple of 27: counted from 1 there would be 37
    ("1/4", [0]),
    ("3,1", [0, 250, 499, 500]),  # the only step of a section is its least noisy
    ("1000", list(range(1000))),
])
def test_respacing_keeps_the_reference_steps(spec, kept):
    np.testing.assert_array_equal(respace(COSINE, spec).timesteps, kept)


def test_respacing_64_and_250():
    steps = respace(COSINE, "64").timesteps
    assert list(steps[:6]) == [0, 16, 32, 48, 63, 79] and list(steps[-4:]) == [951, 967, 983, 999] and len(steps) == 64
    steps = respace(COSINE, "250").timesteps
    assert list(steps[-4:]) == [987, 991, 995, 999] and len(steps) == 250


def test_respacing_adds_up_its_stride_in_floating_point():
    """10 strides of 49.95 are 499.5, which rounds to 500, but added one by one they fall short of it."""
    assert respace(COSINE, "21").timesteps[10] == 499


@pytest.mark.parametrize("spec", ["fast27", "64", "ddim25"])
def test_respacing_keeps_noise_levels(spec):
    respaced = respace(LINEAR, spec)
    np.testing.assert_allclose(respaced.alpha_bars, LINEAR.alpha_bars[respaced.timesteps], rtol=1e-10)
    assert respaced.timesteps.dtype == np.int32


def test_respacing_twice_tells_original_timesteps():
    twice = respace(respace(COSINE, "ddim50"), "5,5")
    assert set(twice.timesteps) <= set(range(0, 1000, 20)) and twice.timesteps[-1] == 980
    np.testing.assert_allclose(twice.alpha_bars, COSINE.alpha_bars[twice.timesteps], rtol=1e-10)


@pytest.mark.parametrize("count", [1, 2, 5, 10, 27, 50, 250, 1000])
def test_even_chains_start_at_the_noisiest_step(count):
    """Sampling starts from pure noise, so the first step taken must be T - 1. One step is a chain too."""
    respaced = respace(COSINE, str(count))
    assert respaced.num_steps == count and respaced.timesteps[-1] == 999 and respaced.alpha_bars_prev[0] == 1
    assert all(np.all(np.isfinite(table)) for table in respaced)


@pytest.mark.parametrize(("spec", "message"), [
    ("0", "between 1 and 1000 in section 1, not 0"),
    ("1001", "between 1 and 1000"),
    ("10,0", "in section 2, not 0"),
    ("ddim64", "no integer stride takes 64 of 1000 steps; use '64'"),
    ("ddim0", "no integer stride"),
    ("", "expected a number of steps"),
    ("fast28", "expected a number of steps"),
    ("-5", "expected a number of steps"),
])
def test_impossible_respacing(spec, message):
    with pytest.raises(ValueError, match=message):
        respace(COSINE, spec)


@pytest.mark.parametrize(("name", "length", "message"), [
    ("squared", 1000, "expected one of cosine, linear"),
    ("cosine", 0, "at least 1"),
    ("linear", 20, "at least 21"),
])
def test_impossible_schedules(name, length, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(name, length)


def test_traced_tables_lose_nothing():
    """Passed through jit as an argument, each table is within float32 rounding of its float64 value."""
    traced = jax.jit(lambda schedule: schedule)(COSINE)
    assert isinstance(traced, NoiseSchedule) and traced.num_steps == 1000
    for ours, expected in zip(traced, COSINE, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-7)


def test_gather_shapes():
    like = jnp.zeros((2, 3, 3, 1))
    t = jnp.array([5, 7])
    for tables in (COSINE, jax.device_put(COSINE)):
        assert table_at(tables.betas, t, like).shape == (2, 1, 1, 1)
        assert table_at(tables.betas, t, jnp.zeros(2)).shape == (2,)
        assert table_at(tables.betas, jnp.int32(7), like).shape == ()
        np.testing.assert_allclose(table_at(tables.betas, t, like).ravel(), COSINE.betas[[5, 7]], rtol=1e-7)


@pytest.mark.parametrize("name", ["cosine", "linear"])
@pytest.mark.parametrize("count", [2, 5, 20, 50, 1000])
def test_steps_that_are_even_in_the_log_snr(name, count):
    whole = make_schedule(name, 1000)
    kept = np.asarray(respace(whole, f"logsnr{count}").timesteps)
    assert len(kept) == count and (np.diff(kept) > 0).all() and kept[0] == 0
    log_snr = 0.5 * np.log(np.float64(whole.alpha_bars) / np.float64(whole.beta_bars))
    if count <= 20:
        wanted = np.linspace(log_snr[0], max(log_snr[-1], -5.1), count)
        step = np.abs(np.diff(log_snr)).max()
        assert np.abs(log_snr[kept] - wanted).max() <= step / 2


def test_a_number_of_steps_of_dpm_solver_is_even_in_the_log_snr():
    assert [respacing("dpm++", steps) for steps in ("20", "fast27")] == ["logsnr20", "fast27"]
    assert respacing("ddim", "20") == "20"
