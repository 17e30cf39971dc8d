"""Compiles every stage's train step and sampling for GPUs that are not there, with the compiler of jax[cuda]."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from shrink import CONFIGS

from unclip_jax import cli
from unclip_jax.model import CHUNK_ROWS
from unclip_jax.models import layers
from unclip_jax.planning import flops, traffic
from unclip_jax.planning.compiling import compile_program
from unclip_jax.planning.gpus import GPU_OPTIONS, gpu_devices
from unclip_jax.planning.hlo import parse
from unclip_jax.planning.programs import sample_program, train_program

MISSING = not any(map(importlib.util.find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin")))
pytestmark = [pytest.mark.gpu_compile, pytest.mark.skipif(MISSING, reason="needs jax[cuda]")]

SAMPLED = [name for name in CONFIGS if not name.startswith("clip")]
PROGRAMS = [(name, "train") for name in CONFIGS] + [(name, "sample") for name in SAMPLED]
TARGETS = [("h100", "bfloat16"), ("l4", "bfloat16"), ("t4", "float32")]
ATTENTIONS = "__cudnn$fmha"  # how the targets of cuDNN's calls begin
WITHOUT = ("upsampler_256", "upsampler_1024")  # attention


@pytest.fixture(autouse=True)
def as_users_have_it():
    """The types and the precision of products that the commands run with, instead of the tests'."""
    with jax.default_matmul_precision(None), jax.numpy_dtype_promotion("standard"):
        yield
    jax.clear_caches()


@pytest.fixture
def plainly(monkeypatch):
    """Shapes of the queries (B, H, T, D) of every bfloat16 attention that is traced for the GPU without a kernel."""
    shapes, plain = [], layers.plain_attention

    def noted(query, *rest):
        if layers.compute_capability() and query.dtype == jnp.bfloat16:  # else for shapes alone, or in a float32 CLIP
            shapes.append(query.shape)
        return plain(query, *rest)

    monkeypatch.setattr(layers, "plain_attention", noted)
    return shapes


def load(name, size, dtype, **changes):
    config = cli.load_config(f"configs/{name}.py:{size}").unlock()
    config.update_from_flattened_dict({"dtype": dtype} | changes)
    return config.lock()


def traced(config, call, devices):
    return train_program(config, devices) if call == "train" else sample_program(config, devices[:1], CHUNK_ROWS)


@pytest.mark.parametrize(("gpu", "dtype"), TARGETS, ids=[gpu for gpu, _ in TARGETS])
@pytest.mark.parametrize("size", ["tiny", "small"])
@pytest.mark.parametrize(("name", "call"), PROGRAMS, ids=[f"{name}-{call}" for name, call in PROGRAMS])
def test_every_program_compiles_with_cudnns_attention(name, call, size, gpu, dtype, plainly):
    program = traced(load(name, size, dtype), call, gpu_devices(gpu, 1))
    done = compile_program(program.traced, f"{name}:{size} {call} for {gpu}", tpu=False, options=GPU_OPTIONS)
    assert done.memory["arguments"] > 0 and done.moved_bytes > 0 and not done.collectives
    text = done.executable.as_text()
    assert (ATTENTIONS in text) == (dtype == "bfloat16" and name not in WITHOUT)
    if call == "train":
        assert ("Backward" in text and ATTENTIONS in text) == (dtype == "bfloat16" and name not in WITHOUT)
    if dtype == "bfloat16":  # a query by itself, in a loop that draws codes, is no work for a kernel
        assert {length for _, _, length, _ in plainly} <= {1}


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in WITHOUT])
def test_cudnns_products_are_counted(name):
    config = load(name, "tiny", "bfloat16")
    here, there = (train_program(config, devices) for devices in (jax.devices()[:1], gpu_devices("h100", 1)))
    here, there = flops.executed_flops(here.traced.jaxpr), flops.executed_flops(there.traced.jaxpr)
    assert here < there < 1.05 * here  # a kernel's gradient makes the logits again


@pytest.mark.parametrize("name", CONFIGS)
def test_eight_gpus_gather_and_reduce_and_no_more(name):
    config = load(name, "small", "bfloat16", **{"mesh.fsdp": 8})
    program = traced(config, "train", gpu_devices("h100", 8))
    text = program.traced.lower().compile(compiler_options=GPU_OPTIONS).as_text()
    kinds = {each.kind for each in traffic.collectives(parse(text))}
    assert kinds <= {"all-gather", "all-reduce", "reduce-scatter"} and "all-gather" in kinds
