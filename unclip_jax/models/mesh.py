"""The mesh as seen from inside a network: which devices it is compiled for, and running a function on each of them."""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from flax.core import meta
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from unclip_jax.arrays import Array

# Operations that XLA hands to YNNPACK on a CPU: its default ones without convolutions. YNNPACK splits convolutions over
# threads in blocks of 64 channels and 64 columns, so those of small models run on one thread. With Eigen's convolutions
# small models sample 1.6 times as fast on two cores.
CPU_OPTIONS = {
    "xla_cpu_experimental_ynn_fusion_type": ",".join(
        f"LIBRARY_FUSION_TYPE_{kind}" for kind in ("DOT", "INDIVIDUAL_DOT", "REDUCE")
    )
}

# A device of the mesh that a function is being traced for: JAX's abstract meshes do not know its compute capability.
_device: contextvars.ContextVar[jax.Device | None] = contextvars.ContextVar("device", default=None)


def jit_on_mesh(
    function: Callable, mesh: Mesh, tpu_options: dict[str, str] | None = None, dtype: str = "", **options: Any
) -> Callable:
    """`jax.jit` for arguments that lie on `mesh`. Inside `function`, this module's other functions know the mesh.

    tpu_options: of the compiler, on a TPU. dtype: of a config, for `full_products`. options: of `jax.jit`.
    """
    device = mesh.devices.flat[0]
    kind = device.platform

    @functools.wraps(function)
    def traced(*args: Any) -> Any:
        token = _device.set(device)
        try:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), full_products(dtype):
                return function(*args)
        finally:
            _device.reset(token)

    given = tpu_options if kind == "tpu" else _cpu_options() if kind == "cpu" else None
    return jax.jit(traced, compiler_options=given, **options)


def full_products(dtype: str) -> contextlib.AbstractContextManager:
    """Makes products and convolutions of float32 traced inside those of float32, if that is the dtype of the config.

    Elsewhere they are as the platform has them: a TPU multiplies float32 in bfloat16, and a GPU in TF32.
    """
    return jax.default_matmul_precision("highest") if dtype == "float32" else contextlib.nullcontext()


def one_device(device: jax.Device | None = None) -> Mesh:
    """Makes a mesh of a single device, by default this process's first."""
    return Mesh([device or jax.local_devices()[0]], ("device",))


@functools.cache
def _cpu_options() -> dict[str, str] | None:
    """CPU_OPTIONS, or None where this version of XLA does not know them."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        try:
            jax.jit(lambda: 0, compiler_options=CPU_OPTIONS).lower().compile()
        except jax.errors.JaxRuntimeError:
            return None
    return CPU_OPTIONS


def platform() -> str:
    """The name of the mesh's platform: "cpu", "gpu", "tpu" or another; "" outside `jit_on_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    return "" if mesh.empty else mesh.abstract_device.platform


def compute_capability() -> float:
    """NVIDIA's compute capability of the mesh's devices, such as 9.0; 0 for other devices and outside `jit_on_mesh`."""
    found = str(getattr(_device.get(), "compute_capability", ""))  # AMD's is a name, such as gfx942
    return float(found) if found.replace(".", "").isdigit() else 0.0


def replicate(x: Array) -> Array:
    """Copies x, whose rows may lie on different devices, to every device in full."""
    return jax.lax.with_sharding_constraint(x, P()) if _split() else x


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Split(meta.AxisMetadata[Any]):
    """A parameter that is split over the mesh's axis "fsdp". Inside `by_rows` each device has its part, and a layer
    that reads the parameter gathers it: Flax unboxes what it reads, in a stack of layers one layer at a time.

    Goes where the parameter would: holds an array, its shape or a part of it. axis: which is split, counted from the
    end, so that it stays the same for a layer of a stack.
    """

    value: Any
    axis: int = dataclasses.field(metadata={"static": True})

    @property
    def spec(self) -> P:
        """Place of the whole array on the mesh."""
        axes = [None] * self.value.ndim
        axes[self.axis] = "fsdp"
        return P(*axes)

    def unbox(self) -> Array:
        return jax.lax.all_gather(self.value, "fsdp", axis=self.value.ndim + self.axis, tiled=True)

    def replace_boxed(self, val: Any) -> "Split":
        return Split(val, self.axis)

    def add_axis(self, index: int, params: dict[Any, Any]) -> "Split":
        return self

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "Split":
        return self


def specs(tree: Any) -> Any:
    """Tells how parameters lie on the mesh: those in a `Split` split, the others whole on every device."""
    return jax.tree.map(
        lambda leaf: leaf.spec if isinstance(leaf, Split) else P(), tree, is_leaf=lambda leaf: isinstance(leaf, Split)
    )


def by_rows(function: Callable, shared: Any, rows: Any) -> Any:
    """Computes function(shared, rows) on each device for the rows that lie there.

    For functions that the compiler cannot split over devices, or not well. `rows` and the result are pytrees whose
    leading axes are rows; every device gets all of `shared`, but of a `Split` its part. Where rows do not split evenly,
    each device computes all, which does not go with a `Split`.
    """
    mesh, axes = jax.sharding.get_abstract_mesh(), _split()
    devices = math.prod(mesh.shape[name] for name in axes)
    if not axes or jax.tree.leaves(rows)[0].shape[0] % devices:
        return function(shared, rows)
    split = jax.shard_map(function, mesh=mesh, in_specs=(specs(shared), P(axes)), out_specs=P(axes), check_vma=False)
    return split(shared, rows)


def _split() -> tuple[str, ...]:
    """Axes of the mesh that the compiler may split arrays over: none outside `jit_on_mesh` or inside `by_rows`."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind == AxisType.Auto)
