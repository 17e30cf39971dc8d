"""Devices as a network may know them, and how a part of it is run on each of them by itself."""

import contextvars
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

# What YNNPACK computes for XLA on a CPU: all that it does by default but convolutions. It splits those over threads by
# blocks of 64 channels and 64 columns, so that small models' run on one. By Eigen they draw 1.6 times as fast on two.
CPU_OPTIONS = {
    "xla_cpu_experimental_ynn_fusion_type": ",".join(
        f"LIBRARY_FUSION_TYPE_{kind}" for kind in ("DOT", "INDIVIDUAL_DOT", "REDUCE")
    )
}

# A device of the mesh that a function is being traced for: JAX's abstract meshes do not tell what it is capable of.
_device: contextvars.ContextVar[jax.Device | None] = contextvars.ContextVar("device", default=None)


def jit_on_mesh(function: Callable, mesh: Mesh, tpu_options: dict[str, str] | None = None, **options) -> Callable:
    """`jax.jit`, for arguments that lie on that mesh; within `function` the rest of this module knows its devices.

    tpu_options: to the compiler, on a TPU. options: to `jax.jit`.
    """
    device = mesh.devices.flat[0]
    kind = device.platform

    @functools.wraps(function)
    def traced(*args):
        token = _device.set(device)
        try:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return function(*args)
        finally:
            _device.reset(token)

    given = tpu_options if kind == "tpu" else _cpu_options() if kind == "cpu" else None
    return jax.jit(traced, compiler_options=given, **options)


def one_device(device: jax.Device | None = None) -> Mesh:
    """A mesh of that device alone, or of this process's first."""
    return Mesh([device or jax.local_devices()[0]], ("device",))


@functools.cache
def _cpu_options() -> dict[str, str] | None:
    """CPU_OPTIONS, unless this version of XLA has other names for them."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        try:
            jax.jit(lambda: 0, compiler_options=CPU_OPTIONS).lower().compile()
        except jax.errors.JaxRuntimeError:
            return None
    return CPU_OPTIONS


def platform() -> str:
    """Returns "cpu", "gpu", "tpu" or another platform's name; "" outside of `jit_on_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    return "" if mesh.empty else mesh.abstract_device.platform


def compute_capability() -> float:
    """NVIDIA's compute capability of the mesh's devices, such as 9.0; 0 for all others and outside of `jit_on_mesh`."""
    found = str(getattr(_device.get(), "compute_capability", ""))  # AMD's are no numbers
    return float(found) if found.replace(".", "").isdigit() else 0.0


def replicate(x: jax.Array) -> jax.Array:
    """x on every device, where its rows lay on different ones."""
    return jax.lax.with_sharding_constraint(x, P()) if _split() else x


def by_rows(function: Callable, shared: Any, rows: Any) -> Any:
    """function(shared, rows), each device with its own part of the rows (leading axes) of a pytree, result likewise.

    For what the compiler cannot split by itself, or not well. Where rows do not split evenly, all are done everywhere.
    """
    mesh, axes = jax.sharding.get_abstract_mesh(), _split()
    devices = math.prod(mesh.shape[name] for name in axes)
    if not axes or jax.tree.leaves(rows)[0].shape[0] % devices:
        return function(shared, rows)
    split = jax.shard_map(function, mesh=mesh, in_specs=(P(), P(axes)), out_specs=P(axes), check_vma=False)
    return split(shared, rows)


def _split() -> tuple[str, ...]:
    """Axes of the mesh that the compiler splits arrays over: none outside of `jit_on_mesh`, nor inside of `by_rows`."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind == AxisType.Auto)
