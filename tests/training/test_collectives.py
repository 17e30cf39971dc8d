"""What devices tell each other in the train steps of the real networks, compiled for eight of them."""

import re

import jax
import pytest
from ml_collections import ConfigDict
from shrink import CONFIGS, small_stage

from unclip_jax.training import sharding
from unclip_jax.training.state import abstract_state, make_train_step, root_key

FAST = ("clip",)


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in CONFIGS])
def test_parameters_are_gathered_gradients_summed_and_nothing_is_permuted(name, monkeypatch):
    monkeypatch.setattr(sharding, "SMALLEST_SPLIT", 256)  # so that the small networks' parameters are split, too
    stage, frozen, _ = small_stage(name)
    config = stage.config.copy_and_resolve_references().unlock()
    if name == "clip":
        config.optim.update(dict(sam_rho=0.1, sam_rows=2))
        stage = type(stage)(config)
    mesh = sharding.make_mesh(ConfigDict(dict(data=2, fsdp=4)), jax.devices()[:8])
    step = make_train_step(stage, config, mesh)
    state = abstract_state(stage, config, mesh)
    text = step.lower(state, frozen, stage.batch_spec(config.train.batch_size), root_key(0)).compile().as_text()
    operations = set(re.findall(r" (all-gather|all-reduce|all-to-all|collective-permute)(?:-start)?\(", text))
    assert operations == {"all-gather", "all-reduce"}
