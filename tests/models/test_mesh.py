"""How a function is compiled for the devices of a mesh."""

import os
import subprocess
import sys

import pytest

from unclip_jax.models import mesh


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
