"""What a network may know of the devices that it runs on, and how a part of it is run on each of them by itself."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P


def on_mesh(function: Callable, mesh: Mesh) -> Callable:
    """`function`, to be jitted for arguments that lie on that mesh; the rest of this module then knows its devices."""

    @functools.wraps(function)
    def traced(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return traced


def platform() -> str:
    """Such as "cpu", "gpu" or "tpu"; "" outside of `on_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    return "" if mesh.empty else mesh.abstract_device.platform


def whole(x: jax.Array) -> jax.Array:
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
    """Axes of the mesh that the compiler splits arrays over: none outside of `on_mesh`, nor inside of `by_rows`."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind == AxisType.Auto)
