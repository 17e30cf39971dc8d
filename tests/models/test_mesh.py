"""How a function is compiled for the devices of a mesh."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from unclip_jax.models import mesh
from unclip_jax.models.transformer import UNROLLED, Transformer
from unclip_jax.training.sharding import make_mesh, split_kernels


@pytest.fixture
def asked_afresh():
    mesh._cpu_options.cache_clear()
    yield
    mesh._cpu_options.cache_clear()


CONVOLUTION = """
import jax, jax.numpy as jnp
from unclip_jax.models.mesh import jit_on_mesh, one_device

def convolved(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

jitted = jit_on_mesh(convolved, one_device())
program = jitted.lower(jnp.ones((2, 64, 64, 64)), jnp.ones((3, 3, 64, 64))).compile().as_text()
print("ynn" in program, "convolution" in program)
"""


def test_a_cpu_convolves_without_the_library_that_uses_one_thread():
    """In a process of its own: the tests' compiler, which optimises nothing, calls no library."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path), "XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, "-c", CONVOLUTION], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True"], done.stderr


def test_a_compiler_that_does_not_know_the_option_is_left_alone(monkeypatch, asked_afresh):
    monkeypatch.setattr(mesh, "CPU_OPTIONS", {"xla_cpu_of_another_year": "1"})
    assert mesh._cpu_options() is None
    assert mesh.jit_on_mesh(lambda: 3, mesh.one_device())() == 3


def test_a_stack_of_layers_gathers_one_at_a_time(monkeypatch):
    """What it computes of rows on eight devices, four of which share its kernels, is what one device computes."""
    monkeypatch.setattr("unclip_jax.training.sharding.SMALLEST_SPLIT", 256)
    depth, devices = UNROLLED + 1, make_mesh(ConfigDict(dict(data=2, fsdp=4)), jax.devices())
    stack = Transformer(depth, 2, "gelu", jnp.float32, remat=False)
    x = jax.random.normal(jax.random.key(0), (8, 3, 16))
    params = jax.jit(stack.init)(jax.random.key(1), x)["params"]
    split = split_kernels(params, devices)
    boxes = jax.tree.leaves(split, is_leaf=lambda leaf: isinstance(leaf, mesh.Split))
    assert sum(isinstance(leaf, mesh.Split) for leaf in boxes) == 4

    placed = jax.device_put(split, jax.tree.map(lambda spec: NamedSharding(devices, spec), mesh.specs(split)))
    rows = jax.device_put(x, NamedSharding(devices, P(devices.axis_names)))
    apply = mesh.jit_on_mesh(lambda p, x: mesh.by_rows(lambda p, x: stack.apply({"params": p}, x), p, x), devices)
    program = apply.lower(placed, rows).compile()
    gathered = re.findall(r"f32\[([\d,]+)\]\S* all-gather", program.as_text())
    assert sorted(gathered) == ["16,16", "16,48", "16,64", "64,16"], "no axis of layers"
    np.testing.assert_allclose(program(placed, rows), jax.jit(stack.apply)({"params": params}, x), atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", ""])
def test_float32_means_float32_on_every_platform(dtype):
    """XLA's word for it, on products and convolutions and on those of their gradients."""
    def loss(x, kernel, w):
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jnp.sum(jnp.tanh(y @ w))

    arguments = (jnp.ones((1, 4, 4, 3)), jnp.ones((3, 3, 3, 8)), jnp.ones((8, 2)))
    with jax.default_matmul_precision(None):
        lowered = mesh.jit_on_mesh(jax.grad(loss, (0, 1, 2)), mesh.one_device(), dtype=dtype).lower(*arguments)
    products = re.findall(r"stablehlo\.(?:convolution|dot_general).*", lowered.as_text())
    assert len(products) >= 5
    precise = ["HIGHEST" in line for line in products]
    assert all(precise) if dtype == "float32" else not any(precise)
