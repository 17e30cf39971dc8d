"""Programs that draw, compiled for eight devices: what each computes, and what they tell each other."""

import re

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict
from shrink import CONFIGS, small_stage

from unclip_jax.keys import RowKeys
from unclip_jax.model import jitted_sample
from unclip_jax.models.mesh import specs
from unclip_jax.planning.programs import conditions
from unclip_jax.training import sharding

ROWS, FAST = 16, ("prior_diffusion",)
DRAWN = [name for name in CONFIGS if not name.startswith("clip")]


def compiled(name, data, fsdp):
    stage, frozen, params = small_stage(name)
    mesh = sharding.make_mesh(ConfigDict(dict(data=data, fsdp=fsdp)), jax.devices()[: data * fsdp])

    def place(leaf):
        spec = P(mesh.axis_names) if np.ndim(leaf) else P()
        return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=NamedSharding(mesh, spec))

    def split(params):
        tree = sharding.split_kernels(params, mesh)
        return jax.device_put(tree, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(tree)))

    numbers = np.zeros(ROWS, np.int32)
    keys = RowKeys(place(jax.random.key(0)), place(numbers), place(numbers))
    given = jax.tree.map(place, conditions(stage, ROWS))
    return jitted_sample(stage, mesh).lower(split(params), split(frozen), given, keys).compile()


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in DRAWN])
def test_each_of_eight_devices_does_an_eighth_and_only_gathers_parameters(name, monkeypatch):
    monkeypatch.setattr(sharding, "SMALLEST_SPLIT", 256)  # so that the small networks' parameters are split, too
    alone, eight, sharing = (compiled(name, data, fsdp) for data, fsdp in ((1, 1), (8, 1), (2, 4)))
    for program, sent in ((eight, set()), (sharing, {"all-gather"})):
        assert program.cost_analysis()["flops"] == pytest.approx(alone.cost_analysis()["flops"] / 8, rel=0.05)
        kinds = " (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\\("
        assert set(re.findall(kinds, program.as_text())) == sent
