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
from unclip_jax.stages import prior_diffusion as module
from unclip_jax.stages.conditions import Conditions
from unclip_jax.stages.prior_diffusion import ESTIMATED_FROM, WHITENED_FROM, PriorDiffusion

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


def test_whitening_is_found_in_training_embeddings():
    config = small_config("prior_diffusion").unlock()
    config.model.embedding_dim = DIM
    config.diffusion.update(dict(whiten=True, embedding_scale=1.0))
    stage = GaussianPrior(config.lock(), CLIP)
    rng = np.random.default_rng(0)
    mean, std = np.array([3.0, -1.0, 0.0, 7.0]), np.array([0.1, 2.0, 1.0, 0.0])
    read = []

    def batches():
        while True:
            read.append(1)
            yield {"z_i": np.float32(mean + std * rng.normal(size=(ROWS, DIM)))}

    params, said = stage.prepare({"embedding_mean": jnp.zeros(DIM), "embedding_std": jnp.ones(DIM)}, {}, batches())
    assert len(read) * ROWS == WHITENED_FROM == said["whitened_from"]
    np.testing.assert_allclose(params["embedding_mean"], mean, atol=4 * 2 / np.sqrt(WHITENED_FROM))
    np.testing.assert_allclose(params["embedding_std"], [0.1, 2.0, 1.0, 1.0], rtol=0.03)  # 1 where nothing differs
    plain = {"left": 1}
    assert prior().prepare(plain, {}, iter(())) == (plain, {})


@pytest.mark.parametrize("scale", [1.0, 17.2])
def test_text_embedding_has_the_scale_of_the_image_embedding(scale):
    """To the network, in the loss and in sampling, z_t is as large as x0; without a condition it is nothing."""
    config = small_config("prior_diffusion").unlock()
    config.model.embedding_dim = DIM
    config.diffusion.update(dict(embedding_scale=scale, drop_text=0.5))
    config.sampling.update(dict(steps="1", draws=1, sampler="ddim"))
    z_t = np.random.default_rng(0).normal(size=(64, DIM)).astype(np.float32)
    given = []

    class Heard(PriorDiffusion):
        def _model(self):
            def apply(variables, x_t, t, tokens, length, text_embedding):
                given.append((length, text_embedding))
                return x_t

            return SimpleNamespace(apply=apply)

        def embeddings(self, frozen, batch):
            return jnp.zeros_like(z_t), z_t

    rows = {"tokens": jnp.ones((64, 10), jnp.int32), "tokens_length": jnp.full(64, 3)}
    stage = Heard(config.lock(), CLIP)
    stage.loss({}, {}, rows, jax.random.key(0))
    stage.loss({}, {}, rows, jax.random.key(0), train=False)
    with jax.disable_jit():
        conditions = Conditions(**rows, text_embedding=jnp.asarray(z_t), guidance_scale=jnp.float32(1))
        stage.sample({}, {}, conditions, jax.random.key(0))
    for (length, seen), kept in zip(given[:3], (slice(15, 49), slice(64, 65), slice(64, 65)), strict=True):
        keep = np.asarray(length) > 0
        assert keep.sum() in range(kept.start, kept.stop)
        full = np.tile(z_t, (len(length) // 64, 1))
        np.testing.assert_allclose(seen, np.where(keep[:, None], scale * full, 0), rtol=1e-6)


def test_of_several_draws_the_nearest_to_the_text_embedding_is_kept(monkeypatch):
    """arXiv 2204.06125, section 2.2: the one of larger dot product with z_t, for each caption on its own."""
    draws, rows = 3, 8
    config = small_config("prior_diffusion").unlock()
    config.model.embedding_dim = DIM
    config.diffusion.embedding_scale = 2.0
    config.sampling.update(dict(draws=draws, sampler="ddim"))
    rng = np.random.default_rng(0)
    drawn, z_t = (rng.normal(size=shape).astype(np.float32) for shape in ((draws, rows, DIM), (rows, DIM)))
    monkeypatch.setattr(module, "draw", lambda *_, **__: jnp.asarray(2 * drawn.reshape(-1, DIM)))
    conditions = Conditions(**{name: array[:rows] for name, array in captions().items()}, text_embedding=z_t)
    kept = GaussianPrior(config.lock(), CLIP).sample({}, {}, conditions, jax.random.key(0))
    nearest = [max(drawn[:, k], key=lambda z, k=k: z @ z_t[k]) for k in range(rows)]
    np.testing.assert_allclose(kept, nearest, rtol=1e-6)
