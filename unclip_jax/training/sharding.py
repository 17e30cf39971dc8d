"""The mesh, and the one rule that lays parameters, their average and Adam's state out over it.

The mesh has two axes. The rows of a batch are split over both. Large parameters are split over "fsdp" only, so "data"
counts the copies of the model (ZeRO over "fsdp", plain data parallelism over "data"). Models know nothing of this: the
loss sees whole parameters (`gather_params`), the optimizer each device's own part.
"""

from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from unclip_jax.arrays import Tree
from unclip_jax.errors import UserError
from unclip_jax.models.mesh import Split

BATCH_AXES = ("data", "fsdp")
SMALLEST_SPLIT = 2**14  # elements; below this a leaf costs more to gather than it saves in memory


def make_mesh(mesh: ConfigDict, devices: list | None = None) -> Mesh:
    """Makes a mesh of axes ("data", "fsdp") over `devices` (all of them by default).

    `mesh.data` of -1 stands for the number of devices over `mesh.fsdp`. Of several TPU slices, each holds whole copies
    of the state: "data" runs over slices first, so that gradients alone go over the network between them. Raises
    UserError when the product of the sizes is not the number of devices, and where a copy would lie in two slices.
    """
    devices = jax.devices() if devices is None else devices
    count, data, fsdp = len(devices), mesh.data, mesh.fsdp
    if fsdp < 1 or (data < 1 and data != -1):
        raise UserError(f"mesh.data={data}, mesh.fsdp={fsdp}: expected positive sizes, or -1 for data")
    if data == -1:
        data = count // fsdp
    if data * fsdp != count:
        raise UserError(
            f"mesh.data={mesh.data}, mesh.fsdp={fsdp} do not cover {count} {devices[0].platform} devices exactly: "
            "their product must be that number (mesh.data=-1 takes what mesh.fsdp leaves)"
        )

    # Any sizes are allowed, even those that cut a side of a TPU slice in two. Axes are Auto, since with Explicit ones a
    # convolution with a sharded kernel is an error.
    # GPUs of several hosts have such an index too, and send each other what they like.
    tpu = devices[0].platform == "tpu"
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if tpu else 1
    if data % slices:
        raise UserError(f"mesh.fsdp={fsdp} spreads a copy of the state over some of {slices} slices: expected a "
                        f"divisor of the {count // slices} devices of one")  # fmt: skip
    if slices > 1:
        inside, between = (data // slices, fsdp), (slices, 1)
        placed = create_hybrid_device_mesh(inside, between, devices, allow_split_physical_axes=True)
    else:
        placed = create_device_mesh((data, fsdp), devices, allow_split_physical_axes=True)
    return Mesh(placed, BATCH_AXES, axis_types=(AxisType.Auto,) * 2)


def param_shardings(tree: Any, mesh: Mesh) -> Any:
    """Gives every leaf of `tree` (parameters, EMA or optimizer state) its NamedSharding; leaves have a `.shape`.

    Split is the last axis but one (a kernel's inputs) where the size of "fsdp" divides it, else the largest axis that
    it divides. A leaf of fewer than `SMALLEST_SPLIT` elements, or without such an axis, is replicated. The rule reads
    shapes alone, so a parameter, its average and its Adam moments always have the same sharding.
    """
    size = mesh.shape.get("fsdp", 1)

    def sharding(leaf: Any) -> NamedSharding:
        axes = [i for i, n in enumerate(leaf.shape) if n % size == 0]
        if size == 1 or not axes or np.prod(leaf.shape, dtype=np.int64) < SMALLEST_SPLIT:
            return NamedSharding(mesh, P())
        # Not the last axis, which lies along a TPU's lanes: once gathered, it would be copied into another layout.
        split = max(axes, key=lambda i: (i == len(leaf.shape) - 2, leaf.shape[i]))
        return NamedSharding(mesh, P(*["fsdp" if i == split else None for i in range(len(leaf.shape))]))

    return jax.tree.map(sharding, tree)


def split_kernels(params: Any, mesh: Mesh) -> Any:
    """Puts into a `Split` the parameters that drawing splits over "fsdp": kernels and tables of embeddings, by the rule
    of `param_shardings`. Leaves have a `.shape`; what is left whole is small."""

    def split(path: tuple, leaf: Any, sharding: NamedSharding) -> Any:
        axis = sharding.spec.index("fsdp") - leaf.ndim if "fsdp" in sharding.spec else 0
        # Not an axis in front, over which layers are stacked: each device needs a part of every layer.
        return Split(leaf, axis) if axis in (-2, -1) and path[-1].key in ("kernel", "embedding") else leaf

    return jax.tree_util.tree_map_with_path(split, params, param_shardings(params, mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows (the leading axis) split over every device of the mesh."""
    return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, P())


def gather_params(params: Tree, mesh: Mesh) -> Any:
    """Gathers `params` on every device, inside a jitted loss.

    XLA's own choice for a convolution with a split kernel is many permutes and all-to-alls. Gathered first, each
    parameter costs one all-gather, and its gradient is summed over the whole mesh.
    """
    return jax.lax.with_sharding_constraint(params, replicated(mesh))


def own_rows(mesh: Mesh, total: int) -> np.ndarray:
    """Numbers, in ascending order, the rows of a global batch of `total` that lie on this process's devices.

    They need not follow each other: on a TPU slice the mesh has the order of its wires, not of the processes. Raises
    UserError when the rows cannot be split evenly over the mesh.
    """
    if total % mesh.size:
        raise UserError(f"a batch of {total} rows cannot be split evenly over {mesh.size} devices")
    places = batch_sharding(mesh).addressable_devices_indices_map((total,)).values()
    return np.sort(np.concatenate([np.arange(total)[place] for place in places]))


def global_batch(arrays: Tree, mesh: Mesh) -> Any:
    """Makes global arrays, split by `batch_sharding`, from the rows of each process.

    arrays: pytree of NumPy arrays: this process's `own_rows`, in their order; every process has as many. Raises
    UserError when the global number of rows cannot be split evenly over the mesh.
    """
    sharding = batch_sharding(mesh)

    def globalize(rows: np.ndarray) -> jax.Array:
        total = len(rows) * jax.process_count()
        if total % mesh.size:
            raise UserError(f"a batch of {total} rows cannot be split evenly over {mesh.size} devices")
        return jax.make_array_from_process_local_data(sharding, rows, (total, *rows.shape[1:]))

    return jax.tree.map(globalize, arrays)


def to_host(leaf: Any) -> np.ndarray:
    """Fetches the whole leaf to this host; every process must call this."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(leaf)
