"""A stage small enough to know by heart, and the config and mesh to train it with."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from unclip_jax.training.sharding import global_batch, make_mesh
from unclip_jax.training.state import make_train_step

ROWS = 32


class ToyStage:
    """Two kernels, of which the first is large enough to be split, and noise on every row."""

    tpu_options = None

    def init(self, key):
        first, second = jax.random.split(key)
        return {
            "hidden": {"kernel": 0.05 * jax.random.normal(first, (128, 256)), "bias": jnp.zeros(256)},
            "out": {"kernel": 0.05 * jax.random.normal(second, (256, 16))},
        }

    def loss(self, params, frozen, batch, key):
        hidden = jnp.tanh(batch["x"] @ params["hidden"]["kernel"] + params["hidden"]["bias"][None])
        out = hidden @ params["out"]["kernel"] + 0.1 * jax.random.normal(key, batch["y"].shape)
        error = jnp.mean((out - batch["y"]) ** 2)
        return error, {"error": error}

    def project(self, params):
        return params


@pytest.fixture(scope="session")
def toy():
    """`ToyStage` and makers of its config, mesh, step and batches."""

    def config(**optim):
        numbers = {
            "learning_rate": 1e-2,
            "warmup_steps": 2,
            "schedule": "cosine",
            "b1": 0.9,
            "b2": 0.99,
            "eps": 1e-8,
            "weight_decay": 0.1,
            "clip_norm": 1.0,
            "ema_decay": 0.99,
            "accumulate": 1,
            "frozen": (),
            "lora_rank": 0,
        }
        train = {"steps": 10, "batch_size": ROWS, "seed": 0, "max_skips": 3}
        return ConfigDict({"dtype": "float32", "optim": numbers | optim, "train": train})

    def mesh(data, fsdp):
        return make_mesh(ConfigDict({"data": data, "fsdp": fsdp}), jax.devices()[: data * fsdp])

    def step(stage, config, mesh):
        return make_train_step(stage, config, mesh)

    def batch(k, mesh):
        rng = np.random.default_rng(k)
        return global_batch(
            {"x": rng.normal(size=(ROWS, 128)).astype("f"), "y": rng.normal(size=(ROWS, 16)).astype("f")}, mesh
        )

    return SimpleNamespace(Stage=ToyStage, config=config, mesh=mesh, step=step, batch=batch)
