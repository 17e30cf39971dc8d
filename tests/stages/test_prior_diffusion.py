"""The variances that are found after training, for embeddings that are Gaussian: all is known in closed form."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from shrink import fake_clip, small_config

from unclip_jax import train
from unclip_jax.diffusion.schedule import make_schedule, table_at
from unclip_jax.errors import UserError
from unclip_jax.stages.conditions import Conditions
from unclip_jax.stages.prior_diffusion import ESTIMATED_FROM, PriorDiffusion

ROWS, DIM, VARIANCE, STEPS = 4096, 4, 0.289, 64
CLIP = fake_clip(config=ConfigDict({"model": {"unit_norm": False}}))
SCHEDULE = make_schedule("cosine", 1000)


class GaussianPrior(PriorDiffusion):
    """Knows that z_i is N(0, VARIANCE), and nothing else."""

    def _model(self):
        def apply(variables, x_t, t, *condition):
            signal, spread = (table_at(table, t, x_t) for table in (SCHEDULE.alpha_bars, SCHEDULE.beta_bars))
            return jnp.sqrt(signal) * VARIANCE / (signal * VARIANCE + spread) * x_t

        return SimpleNamespace(apply=apply)

    def embeddings(self, frozen, batch):
        return batch["z_i"], jnp.zeros_like(batch["z_i"])


def prior(steps=STEPS):
    config = small_config("prior_diffusion").unlock()
    config.model.embedding_dim = DIM
    config.diffusion.embedding_scale = 1.0
    config.sampling.update(dict(steps=str(steps), draws=1, sampler="analytic"))
    return GaussianPrior(config.lock(), CLIP)


def captions():
    return {"tokens": jnp.ones((ROWS, 10), jnp.int32), "tokens_length": jnp.full(ROWS, 3)}


def test_variances_are_the_data_s_and_sampling_keeps_to_them():
    stage = prior()
    z_i = np.random.default_rng(0).normal(size=(ROWS, DIM)).astype(np.float32) * np.sqrt(VARIANCE)
    params, said = stage.finish({}, {}, captions() | {"z_i": z_i}, jax.random.key(1))
    C = np.asarray(params["fixed"]["C"])
    expected = VARIANCE * SCHEDULE.beta_bars / (SCHEDULE.alpha_bars * VARIANCE + SCHEDULE.beta_bars)
    np.testing.assert_allclose(C, expected, rtol=0.04)
    assert float(said["C_least_noise"]) == C[0] and float(said["C_most_noise"]) == C[-1]
    assert C.max() <= (1 + 1e-6) * np.mean(z_i[:ESTIMATED_FROM] ** 2)

    conditions = Conditions(**captions(), text_embedding=jnp.zeros((ROWS, DIM)), guidance_scale=jnp.float32(1))
    sample = jax.jit(stage.sample)
    spread = np.var(sample(params, {}, conditions, jax.random.key(2)))
    assert spread == pytest.approx(VARIANCE, rel=0.03)
    without = np.var(sample({"fixed": {"C": jnp.zeros(1000)}}, {}, conditions, jax.random.key(2)))
    assert without < 0.93 * VARIANCE  # the posterior's variance makes chains of 64 steps too narrow
    fewer = np.var(jax.jit(prior(32).sample)(params, {}, conditions, jax.random.key(2)))
    assert fewer == pytest.approx(VARIANCE, rel=0.03)  # any number of steps, by the same C


def test_fresh_prior_has_the_posterior_s_variance_until_it_is_trained():
    config = small_config("prior_diffusion")
    assert config.sampling.sampler == "analytic"
    clip = train.make_stage(small_config("clip"))
    params = jax.eval_shape(train.make_stage(config, clip).init, jax.random.key(0))
    assert params["fixed"]["C"].shape == (1000,)


@pytest.mark.parametrize("name", ["decoder", "upsampler_256"])
def test_only_the_prior_s_variances_are_estimated(name, tmp_path):
    config = small_config(name).unlock()
    config.sampling.sampler = "analytic"
    with pytest.raises(UserError, match="does not estimate variances"):
        train.check_config(config.lock(), str(tmp_path))
