"""Against tests/goldens/diffusion.npz: outputs of guided-diffusion's own code, for every case it holds."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import golden

from unclip_jax.diffusion.guidance import clip_x0, condition_eps, condition_mean
from unclip_jax.diffusion.losses import training_loss, vlb_bits
from unclip_jax.diffusion.process import large_variance, make_denoiser, posterior_mean_variance, q_sample
from unclip_jax.diffusion.samplers import ddim_invert, ddim_step, ddpm_step, sample
from unclip_jax.diffusion.schedule import make_schedule, respace

META, INPUTS, OUTPUTS = golden.load(pathlib.Path(__file__).parents[1] / "goldens" / "diffusion.npz")
CASES = {case["name"]: case for case in META["cases"]}
SHORT = [name for name in CASES if f"{name}/sample_ddpm" in OUTPUTS]


def nhwc(array):
    return jnp.asarray(np.moveaxis(array, -3, -1))


def gradient(x, timesteps):
    """meta.cond_fn."""
    return 0.5 * jnp.cos(x + timesteps[:, None, None, None].astype(jnp.float32) / 500)


class Case:
    """One case of the file, with meta.network as its network; `learned` and the rest as our functions name them."""

    def __init__(self, name):
        case = CASES[name]
        self.name, self.predicts = name, case["pred"]
        self.learned, self.large = case["var"] == "learned", "large" in case["var"]
        full = make_schedule(case["schedule"], 1000)
        self.schedule = respace(full, case["spacing"]) if case["spacing"] else full
        denoiser = make_denoiser(self.network, self.schedule, self.predicts, self.learned)
        self.denoiser = large_variance(denoiser, self.schedule) if self.large else denoiser
        self.clipped = clip_x0(self.denoiser, self.schedule, 1.0)

    def network(self, x, timesteps):
        t = timesteps[:, None, None, None].astype(jnp.float32)
        output = 0.6 * x + 0.2 * jnp.sin(3 * x + t / 200)
        return jnp.concatenate([output, 0.8 * jnp.cos(2 * x - t / 300)], -1) if self.learned else output

    def input(self, name):
        return nhwc(INPUTS[f"{self.name}/{name}"] if f"{self.name}/{name}" in INPUTS else INPUTS[name])

    def steps(self, which):
        return jnp.asarray(INPUTS[f"{self.name}/index_{which}"], jnp.int32)

    def check(self, name, ours, tolerance):
        expected = OUTPUTS[f"{self.name}/{name}"]
        ours = np.moveaxis(np.asarray(ours), -1, -3) if expected.ndim > 1 else np.asarray(ours)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize("name", [key for key in OUTPUTS if key.startswith("betas/")])
def test_betas(name):
    _, schedule, length = name.split("/")
    np.testing.assert_allclose(make_schedule(schedule, int(length)).betas, OUTPUTS[name], rtol=1e-12)


@pytest.mark.parametrize("name", [key for key in OUTPUTS if key.startswith("timesteps/")])
def test_kept_timesteps(name):
    respaced = respace(make_schedule("linear", 1000), name.split("/")[1])
    np.testing.assert_array_equal(respaced.timesteps, OUTPUTS[name])


@pytest.mark.parametrize("which", ["a", "b"])
@pytest.mark.parametrize("name", CASES)
def test_single_steps(name, which):
    case = Case(name)
    t, x0 = case.steps(which), case.input("x0")
    x_t = q_sample(case.schedule, x0, t, case.input("noise"))
    case.check(f"q_sample_{which}", x_t, 1e-6)
    for row, i in enumerate(t):
        x_row = x_t[row : row + 1]
        prediction = case.clipped(x_row, i)
        mean, _, log_variance = posterior_mean_variance(case.schedule, prediction.x0, x_row, i)
        if prediction.log_variance is not None:
            log_variance = prediction.log_variance
        for ours, output in ((prediction.x0, "pred_xstart"), (mean, "mean"), (log_variance, "log_variance")):
            expected = OUTPUTS[f"{name}/p_{output}_{which}"][row : row + 1]
            ours = jnp.broadcast_to(ours, x_row.shape)
            # x0 from eps divides by sqrt(alpha_bar): float32's last digit of x_t, magnified, is all that can agree.
            magnified = 1 / float(case.schedule.sqrt_alpha_bars[i]) if output != "log_variance" else 1.0
            atol = 1e-5 + 3e-7 * magnified
            np.testing.assert_allclose(np.moveaxis(np.asarray(ours), -1, 1), expected, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("which", ["a", "b"])
@pytest.mark.parametrize("name", CASES)
def test_losses(name, which):
    case = Case(name)
    t, x0, noise = case.steps(which), case.input("x0"), case.input("noise")
    x_t = q_sample(case.schedule, x0, t, noise)
    output = case.network(x_t, jnp.asarray(case.schedule.timesteps)[t])
    loss, terms = training_loss(case.schedule, output, x0, x_t, noise, t, case.predicts, case.learned, None)
    expected = {"loss": loss, **terms}
    for term, ours in expected.items():
        np.testing.assert_allclose(ours, OUTPUTS[f"{name}/loss_{term}_{which}"], rtol=2e-4, atol=1e-6, err_msg=term)


@pytest.mark.parametrize("which", ["a", "b"])
@pytest.mark.parametrize("name", CASES)
def test_vlb_bits(name, which):
    case = Case(name)
    t, x0 = case.steps(which), case.input("x0")
    x_t = q_sample(case.schedule, x0, t, case.input("noise"))
    for row, i in enumerate(t):
        prediction = case.clipped(x_t[row : row + 1], i)
        ours = vlb_bits(case.schedule, x0[row : row + 1], x_t[row : row + 1], i, prediction.x0, prediction.log_variance)
        expected = OUTPUTS[f"{name}/vb_bits_{which}"][row : row + 1]
        # Pixels far in the tail have a mass below float32's resolution of 1 - tanh, which then rounds either way.
        tails = i == 0 and expected[0] > 10
        np.testing.assert_allclose(ours, expected, rtol=0.06 if tails else 2e-4, atol=1e-6)


def chains():
    """(case, name of the output, denoiser, step) of every stored sample."""
    for name in SHORT:
        case = Case(name)
        yield case, "sample_ddpm", case.clipped, ddpm_step
        yield case, "sample_ddpm_guided", case.clipped, condition_mean(ddpm_step, gradient, 1.0)
        yield case, "sample_ddim_eta0.0", case.clipped, ddim_step(0.0)
        yield case, "sample_ddim_eta0.7", case.clipped, ddim_step(0.7)
        yield case, "sample_ddim_guided", condition_eps(case.clipped, case.schedule, gradient, 1.0), ddim_step(0.0)


@pytest.mark.parametrize(("case", "output", "denoiser", "step"), list(chains()),
                         ids=[f"{case.name}-{output}" for case, output, *_ in chains()])
def test_samples(case, output, denoiser, step):
    run = jax.jit(lambda x_T, noise: sample(denoiser, case.schedule, x_T, None, step, noise))
    # The reference loses digits of its own where it divides by a small sqrt(alpha_bar) after shifting eps: run in
    # float64, the prior's chain lies 2.4e-4 from the stored sample.
    tolerance = 3e-4 if (case.predicts, output) == ("x0", "sample_ddim_guided") else 2e-4
    case.check(output, run(case.input("x_T"), case.input("step_noise")), tolerance)


@pytest.mark.parametrize("name", SHORT)
def test_ddim_inversion(name):
    case = Case(name)
    invert = jax.jit(lambda x_0: ddim_invert(case.denoiser, case.schedule, x_0))
    case.check("ddim_inversion", invert(case.input("x0")), 2e-4)
