"""How a function is compiled for the devices of a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.models import mesh


@pytest.fixture
def asked_afresh():
    mesh._cpu_options.cache_clear()
    yield
    mesh._cpu_options.cache_clear()


def compiled_convolution() -> str:
    """The program of one convolution of 8 channels on one CPU device."""

    def convolved(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    one = jax.sharding.Mesh(jax.devices()[:1], ("device",))
    arguments = jnp.ones((2, 16, 16, 8)), jnp.ones((3, 3, 8, 8))
    jitted = mesh.jit_on_mesh(convolved, one)
    np.testing.assert_allclose(jitted(*arguments)[0, 8, 8], 72.0)
    return jitted.lower(*arguments).compile().as_text()


def test_a_cpu_convolves_without_the_library_that_uses_one_thread():
    assert "ynn" not in compiled_convolution()


def test_a_compiler_that_does_not_know_the_option_is_left_alone(monkeypatch, asked_afresh):
    monkeypatch.setattr(mesh, "CPU_OPTIONS", {"xla_cpu_of_another_year": "1"})
    assert mesh._cpu_options() is None
    assert "convolution" in compiled_convolution()
