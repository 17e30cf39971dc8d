"""Checksums of arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.training.checksums import checksums
from unclip_jax.training.sharding import param_shardings


@pytest.mark.parametrize("dtype", ["float32", "int32", "bfloat16", "float16", "uint8", "bool"])
def test_any_change_of_one_element_changes_the_checksum(dtype):
    rng = np.random.default_rng(0)
    values = jnp.asarray(rng.normal(size=(5, 7, 3)) * 3).astype(dtype)
    first = checksums({"a": values})["a"]
    for _ in range(50):
        at = tuple(rng.integers(size) for size in values.shape)
        raw = np.array(values)
        if dtype == "bool":
            raw[at] ^= True
        else:
            raw.view(np.uint8).reshape(*raw.shape, -1)[(*at, rng.integers(raw.itemsize))] ^= 1 << rng.integers(8)
        assert checksums({"a": jnp.asarray(raw)})["a"] != first


def test_places_count():
    values = jnp.arange(12.0).reshape(3, 4)
    found = {checksums({"a": a})["a"] for a in (values, values[::-1], values[:, ::-1], values.reshape(4, 3), values.T)}
    assert len(found) == 4, "all differ but those of one order: a shape is not part of it"


def test_mesh_does_not_count(toy):
    tree = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(256, 128)), jnp.float32), "b": jnp.ones(3)}
    one = checksums(tree)
    for mesh in (toy.mesh(8, 1), toy.mesh(2, 4)):
        split = jax.device_put(tree, param_shardings(tree, mesh))
        assert checksums(split) == one
