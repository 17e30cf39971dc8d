"""DPM-Solver++(2M) against diffusers' DPMSolverMultistepScheduler, on the same steps of the same chain."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.diffusion.process import make_denoiser
from unclip_jax.diffusion.samplers import dpm_solver_step, sample
from unclip_jax.diffusion.schedule import make_schedule, respace

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")


@pytest.mark.parametrize("predicts", ["eps", "x0"])
@pytest.mark.parametrize("name", ["cosine", "linear"])
@pytest.mark.parametrize("spec", ["logsnr20", "logsnr7", "20"])
def test_samples_are_those_of_diffusers(spec, name, predicts, seen):
    whole = make_schedule(name, 1000)
    schedule = respace(whole, spec)
    x_T = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)

    def network(x, t, sin):  # smooth, and not linear in x
        return sin(x * 1.3 + t / 700) * 0.8

    denoiser = make_denoiser(lambda x, t: network(x, t[:, None], jnp.sin), schedule, predicts, False)
    ours = sample(denoiser, schedule, jnp.asarray(x_T), jax.random.key(0), dpm_solver_step, looks_back=True)

    theirs = diffusers.DPMSolverMultistepScheduler(
        num_train_timesteps=1000, trained_betas=np.asarray(whole.betas, np.float64), algorithm_type="dpmsolver++",
        solver_order=2, prediction_type={"eps": "epsilon", "x0": "sample"}[predicts], final_sigmas_type="zero",
    )  # fmt: skip
    theirs.set_timesteps(timesteps=np.asarray(schedule.timesteps)[::-1].tolist())
    x = torch.tensor(x_T, dtype=torch.float64)
    for t in theirs.timesteps:
        x = theirs.step(network(x, float(t), torch.sin), t, x).prev_sample
    error = np.abs(np.asarray(ours) - x.numpy()).max() / np.abs(x.numpy()).max()
    seen(f"DPM-Solver++, {name}, {predicts}, {spec}", error)
    assert error < 2e-4
