"""NVIDIA GPUs to plan for, and their devices to compile for, which need not exist.

XLA compiles for CUDA from a description of the GPU alone. The numbers come from CUDA's device query and NVIDIA's data
sheets; A100, H100 and H200 are the SXM parts. Without the GPU itself XLA cannot time the algorithms of cuDNN and cuBLAS
and takes the first one that they offer; the workspace of the fastest one, some hundred MB, is not counted.
"""

import jax

from unclip_jax.cli import GPU_SHARE
from unclip_jax.errors import UserError
from unclip_jax.planning.chips import CHIPS, GIB

# Nothing is tried out on the device. XLA's own matrix products (Triton) then find no tiles for some float32 shapes.
GPU_OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
DESCRIPTION = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {threads}
  shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {optin}
  core_count: {cores} fpus_per_core: {units} clock_rate_ghz: {clock}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: {bandwidth} device_memory_size: {memory} l2_cache_size: {cache}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
device_description_str: "{name}"
"""
# Compute capability → per core (streaming multiprocessor): float32 units, most threads, bytes of shared memory, and how
# many of these bytes one block of threads may have.
CORES = {
    (7, 5): dict(units=64, threads=1024, shared=65536, optin=65536),
    (8, 0): dict(units=64, threads=2048, shared=167936, optin=166912),
    (8, 9): dict(units=128, threads=1536, shared=102400, optin=101376),
    (9, 0): dict(units=128, threads=2048, shared=233472, optin=232448),
}
HOPPER = dict(major=9, minor=0, cores=132, clock=1.98, cache=50 << 20)
GPUS = {  # clock in GHz, level 2 cache in bytes; memory and its bandwidth are in chips.CHIPS
    "t4": dict(name="Tesla T4", major=7, minor=5, cores=40, clock=1.59, cache=4 << 20),
    "l4": dict(name="NVIDIA L4", major=8, minor=9, cores=58, clock=2.04, cache=48 << 20),
    "a100": dict(name="NVIDIA A100-SXM4-80GB", major=8, minor=0, cores=108, clock=1.41, cache=40 << 20),
    "h100": dict(name="NVIDIA H100 80GB HBM3", **HOPPER),
    "h200": dict(name="NVIDIA H200", **HOPPER),
}


def gpu_devices(kind: str, count: int) -> list[jax.Device]:
    """Returns the devices of a machine with `count` GPUs, to compile for; the machine need not exist.

    kind: a key of GPUS. Raises UserError where JAX's CUDA plugin is not installed, or cannot compile without a GPU.
    """
    from jax.experimental import topologies

    gpu, chip = GPUS[kind], CHIPS[kind]
    sizes = {"memory": round(chip.hbm_gib / GPU_SHARE * GIB), "bandwidth": round(chip.hbm_bandwidth)}
    description = DESCRIPTION.format(**gpu, **CORES[gpu["major"], gpu["minor"]], **sizes)
    jax.devices()  # registers the plugins
    try:
        name = {"platform": "cuda", "topology": f"1x1x{count}"}
        return list(topologies.get_topology_desc(**name, target_config=description).devices)
    except NotImplementedError:
        raise UserError("the CUDA compiler is not installed: pip install 'unclip_jax[cuda]' (no GPU needed)") from None
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"jax {jax.__version__} cannot compile for GPUs that are not there ({str(error).splitlines()[0]}): plan "
            "with another version of jax, or on the GPU itself with --topology=local"
        ) from error
