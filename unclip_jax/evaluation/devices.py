"""Rows of anything through one function, split over all devices of this process."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from unclip_jax.errors import UserError
from unclip_jax.models.mesh import by_rows, jit_on_mesh


class OnDevices:
    """function(shared, rows) in float32, compiled once and called for any number of rows.

    Every device is always given `rows` of them: the program is the same for any batch and for any number of devices,
    and so is what it makes of a row.

    function: takes `shared`, a pytree that each device holds whole, and an array (rows, ...); gives a pytree of arrays
    (rows, ...). devices: those of this process, unless others are named.
    """

    def __init__(self, function: Callable, shared: Any, rows: int, devices: list[jax.Device] | None = None):
        mesh = Mesh(np.array(devices or jax.local_devices()), ("rows",))
        self._size = rows * mesh.size
        self._split = NamedSharding(mesh, P("rows"))
        self._shared = jax.device_put(shared, NamedSharding(mesh, P()))

        def run(shared, rows):
            return by_rows(function, shared, rows)

        self._run = jit_on_mesh(run, mesh, dtype="float32")

    def __call__(self, batches: Iterable[np.ndarray]) -> Iterator[Any]:
        """Batches (n, ...), n of any size → results of all their rows in order, as NumPy arrays, in other batches.

        Raises UserError where rows differ in shape.
        """
        waiting = None
        for rows, count in self._filled(batches):
            result = self._run(self._shared, jax.device_put(rows, self._split))
            if waiting:  # fetched while the devices compute the next
                yield _fetch(*waiting)
            waiting = result, count
        if waiting:
            yield _fetch(*waiting)

    def _filled(self, batches: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, int]]:
        """Batches of one size, the last filled up with its first row, and how many of their rows are real."""
        for rows in rebatched(batches, self._size):
            fill = self._size - len(rows)
            yield np.concatenate([rows, np.repeat(rows[:1], fill, axis=0)]) if fill else rows, len(rows)


def rebatched(batches: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The rows of batches of any size in batches of `size`, the last with what is left. Raises UserError where rows
    differ in shape."""
    held = None
    for batch in batches:
        if held is not None and batch.shape[1:] != held.shape[1:]:
            raise UserError(f"rows of shapes {held.shape[1:]} and {batch.shape[1:]}: bring all to one size first")
        held = batch if held is None or not len(held) else np.concatenate([held, batch])
        while len(held) >= size:
            yield held[:size]
            held = held[size:]
    if held is not None and len(held):
        yield held


def _fetch(result: Any, count: int) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf)[:count], result)
