"""Every table, step, loss and sampling chain of a stored diffusion file, against our functions.

The file's network is a formula; its outputs come from guided-diffusion's own code.
"""

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.diffusion.guidance import clip_x0, condition_eps, condition_mean
from unclip_jax.diffusion.losses import training_loss, vlb_bits
from unclip_jax.diffusion.process import large_variance, make_denoiser, posterior_mean_variance, q_sample
from unclip_jax.diffusion.samplers import ddim_invert, ddim_step, ddpm_step, sample
from unclip_jax.diffusion.schedule import make_schedule, respace


def check(meta, inputs, outputs):
    """All of one file. Raises AssertionError naming what differs."""
    for name, expected in outputs.items():
        if name.startswith("betas/"):
            _, schedule, length = name.split("/")
            np.testing.assert_allclose(make_schedule(schedule, int(length)).betas, expected, rtol=1e-6, err_msg=name)
        if name.startswith("timesteps/"):
            spec = name.removeprefix("timesteps/")
            kept = respace(make_schedule("linear", 1000), spec).timesteps
            np.testing.assert_array_equal(kept, expected, err_msg=name)
    for description in meta["cases"]:
        case = Case(description, inputs, outputs)
        for which in ("a", "b"):
            check_single_steps(case, which)
            check_losses(case, which)
            check_vlb_bits(case, which)
        check_chains(case)


def nhwc(array):
    return jnp.asarray(np.moveaxis(array, -3, -1))


def gradient(x, timesteps):
    """meta.cond_fn."""
    return 0.5 * jnp.cos(x + timesteps[:, None, None, None].astype(jnp.float32) / 500)


class Case:
    """One case of the file, with meta.network as its network; `learned` and the rest as our functions name them."""

    def __init__(self, description, inputs, outputs):
        self.name, self.predicts = description["name"], description["pred"]
        self.inputs, self.outputs = inputs, outputs
        self.learned, self.large = description["var"] == "learned", "large" in description["var"]
        full = make_schedule(description["schedule"], 1000)
        self.schedule = respace(full, description["spacing"]) if description["spacing"] else full
        denoiser = make_denoiser(self.network, self.schedule, self.predicts, self.learned)
        self.denoiser = large_variance(denoiser, self.schedule) if self.large else denoiser
        self.clipped = clip_x0(self.denoiser, self.schedule, 1.0)

    def network(self, x, timesteps):
        t = timesteps[:, None, None, None].astype(jnp.float32)
        output = 0.6 * x + 0.2 * jnp.sin(3 * x + t / 200)
        return jnp.concatenate([output, 0.8 * jnp.cos(2 * x - t / 300)], -1) if self.learned else output

    def input(self, name):
        own = f"{self.name}/{name}"
        return nhwc(self.inputs[own if own in self.inputs else name])

    def steps(self, which):
        return jnp.asarray(self.inputs[f"{self.name}/index_{which}"], jnp.int32)

    def output(self, name):
        return self.outputs[f"{self.name}/{name}"]

    def check(self, name, ours, tolerance):
        expected = self.output(name)
        ours = np.moveaxis(np.asarray(ours), -1, -3) if expected.ndim > 1 else np.asarray(ours)
        atol = tolerance * max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(ours, expected, rtol=0, atol=atol, err_msg=f"{self.name}/{name}")


def check_single_steps(case, which):
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
            name = f"p_{output}_{which}"
            ours = jnp.broadcast_to(ours, x_row.shape)
            # x0 from eps divides by sqrt(alpha_bar): float32's last digit of x_t, magnified, is all that can agree.
            magnified = 1 / float(case.schedule.sqrt_alpha_bars[i]) if output != "log_variance" else 1.0
            np.testing.assert_allclose(
                np.moveaxis(np.asarray(ours), -1, 1),
                case.output(name)[row : row + 1],
                rtol=1e-5,
                atol=1e-5 + 3e-7 * magnified,
                err_msg=f"{case.name}/{name}",
            )


def check_losses(case, which):
    t, x0, noise = case.steps(which), case.input("x0"), case.input("noise")
    x_t = q_sample(case.schedule, x0, t, noise)
    output = case.network(x_t, jnp.asarray(case.schedule.timesteps)[t])
    loss, terms = training_loss(case.schedule, output, x0, x_t, noise, t, case.predicts, case.learned, None)
    for term, ours in {"loss": loss, **terms}.items():
        name = f"loss_{term}_{which}"
        np.testing.assert_allclose(ours, case.output(name), rtol=2e-4, atol=1e-6, err_msg=f"{case.name}/{name}")


def check_vlb_bits(case, which):
    t, x0 = case.steps(which), case.input("x0")
    x_t = q_sample(case.schedule, x0, t, case.input("noise"))
    for row, i in enumerate(t):
        prediction = case.clipped(x_t[row : row + 1], i)
        ours = vlb_bits(case.schedule, x0[row : row + 1], x_t[row : row + 1], i, prediction.x0, prediction.log_variance)
        expected = case.output(f"vb_bits_{which}")[row : row + 1]
        # Pixels far in the tail have a mass below float32's resolution of 1 - tanh, which then rounds either way.
        tails = i == 0 and expected[0] > 10
        np.testing.assert_allclose(ours, expected, rtol=0.06 if tails else 2e-4, atol=1e-6, err_msg=case.name)


def check_chains(case):
    chains = {
        "sample_ddpm": (case.clipped, ddpm_step),
        "sample_ddpm_guided": (case.clipped, condition_mean(ddpm_step, gradient, 1.0)),
        "sample_ddim_eta0.0": (case.clipped, ddim_step(0.0)),
        "sample_ddim_eta0.7": (case.clipped, ddim_step(0.7)),
        "sample_ddim_guided": (condition_eps(case.clipped, case.schedule, gradient, 1.0), ddim_step(0.0)),
    }
    for name, (denoiser, step) in chains.items():
        if f"{case.name}/{name}" not in case.outputs:
            continue
        run = jax.jit(lambda x_T, noise, d=denoiser, s=step: sample(d, case.schedule, x_T, None, s, noise))
        # The reference loses digits of its own where it divides by a small sqrt(alpha_bar) after shifting eps: run in
        # float64, the prior's chain lies 2.4e-4 from the stored sample.
        tolerance = 3e-4 if (case.predicts, name) == ("x0", "sample_ddim_guided") else 2e-4
        case.check(name, run(case.input("x_T"), case.input("step_noise")), tolerance)
    if f"{case.name}/ddim_inversion" in case.outputs:
        invert = jax.jit(lambda x_0: ddim_invert(case.denoiser, case.schedule, x_0))
        case.check("ddim_inversion", invert(case.input("x0")), 2e-4)
