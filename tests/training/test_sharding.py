import dataclasses
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from unclip_jax.errors import UserError
from unclip_jax.models.mesh import specs
from unclip_jax.training.sharding import (
    gather_params,
    global_batch,
    make_mesh,
    own_rows,
    param_shardings,
    split_kernels,
)


def sizes(data, fsdp):
    return ConfigDict({"data": data, "fsdp": fsdp})


def test_mesh_takes_the_devices_that_fsdp_leaves():
    mesh = make_mesh(sizes(-1, 4))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4}
    assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)
    assert dict(make_mesh(sizes(8, 1)).shape) == {"data": 8, "fsdp": 1}


@dataclasses.dataclass(frozen=True)
class OfSlice:
    """A chip of one of several TPU slices, as mesh_utils looks at it."""

    id: int
    slice_index: int
    process_index: int = 0
    device_kind: str = "any"
    platform: str = "tpu"
    core_on_chip: int = 0

    @property
    def coords(self) -> tuple[int, int, int]:
        return self.id // 2 % 2, self.id // 4, 0


@pytest.mark.parametrize(("data", "fsdp"), [(-1, 1), (-1, 2), (2, 4)])
def test_a_copy_of_the_state_lies_in_one_slice(data, fsdp):
    """Chips of two slices, listed in turns: "data" runs over slices first, "fsdp" within each."""
    chips = [OfSlice(k, k % 2) for k in range(8)]
    mesh = make_mesh(sizes(data, fsdp), chips)
    assert dict(mesh.shape) == {"data": 8 // fsdp, "fsdp": fsdp}
    assert sorted(chip.id for chip in mesh.devices.flat) == list(range(8))
    slices = np.vectorize(lambda chip: chip.slice_index, otypes=[int])(mesh.devices)
    np.testing.assert_array_equal(slices, np.repeat([0, 1], 4).reshape(8 // fsdp, fsdp))


def test_gpus_of_several_hosts_are_no_slices():
    chips = [OfSlice(k, k % 2, platform="gpu", device_kind="any") for k in range(8)]
    assert dict(make_mesh(sizes(-1, 8), chips).shape) == {"data": 1, "fsdp": 8}


def test_a_copy_that_would_lie_in_two_slices_is_refused():
    with pytest.raises(UserError, match=r"mesh\.fsdp=8 spreads a copy .* over some of 2 slices: .* 4 devices"):
        make_mesh(sizes(-1, 8), [OfSlice(k, k % 2) for k in range(8)])


@pytest.mark.parametrize("data, fsdp", [(3, 2), (-1, 3), (4, 1), (-1, 16), (-1, 0), (0, 8), (-2, 4)])
def test_mesh_that_does_not_cover_the_devices_is_an_error(data, fsdp):
    with pytest.raises(UserError, match=f"mesh.data={data}, mesh.fsdp={fsdp}"):
        make_mesh(sizes(data, fsdp))


@pytest.mark.parametrize(
    "shape, spec",
    [
        ((3, 3, 64, 128), P(None, None, "fsdp", None)),
        ((3, 3, 128, 64), P(None, None, "fsdp", None)),
        ((1001, 64), P(None, "fsdp")),  # 1001 is not divisible by 4
        ((256, 1001, 64), P("fsdp", None, None)),  # the largest of the others
        ((1001, 63), P()),  # nothing divisible
        ((127, 128), P()),  # 16,256 elements: below 2^14
        ((2**14,), P("fsdp")),
        ((), P()),
    ],
)
def test_inputs_are_split_or_else_the_largest_divisible_axis(shape, spec):
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    assert param_shardings({"w": leaf}, make_mesh(sizes(2, 4)))["w"].spec == spec


def test_without_fsdp_everything_is_replicated():
    leaf = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    assert param_shardings(leaf, make_mesh(sizes(8, 1))).spec == P()


def test_global_batch_keeps_rows_in_order_and_splits_them_over_all_devices():
    rows = np.arange(16 * 3, dtype=np.uint8).reshape(16, 3)
    array = global_batch({"x": rows}, make_mesh(sizes(2, 4)))["x"]
    assert np.array_equal(array, rows) and array.dtype == np.uint8
    assert sorted(shard.index[0].start for shard in array.addressable_shards) == list(range(0, 16, 2))


PROCESS = """
import sys
import jax, numpy as np
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize("localhost:" + sys.argv[1], 2, int(sys.argv[2]))
from jax.sharding import Mesh
from unclip_jax.training.sharding import BATCH_AXES, global_batch, own_rows, to_host
from unclip_jax.training.checkpoint import SaveClock
assert to_host(jax.numpy.arange(3)).tolist() == [0, 1, 2]  # one's own array is nobody else's
for order in ([0, 1, 2, 3], [0, 2, 1, 3], [3, 0, 1, 2]):
    mesh = Mesh(np.array(jax.devices())[order].reshape(2, 2), BATCH_AXES)
    rows = own_rows(mesh, 12)
    assert len(rows) == 6
    assert to_host(global_batch({"x": rows}, mesh)["x"]).tolist() == list(range(12)), order
    for minutes in ((1e-9, 60), (60, 1e-9), (60, 60)):  # of each process's clock
        clock = SaveClock(minutes[jax.process_index()], mesh)
        assert not clock.due(ask=True)
        assert clock.due(ask=False) == (minutes != (60, 60))
"""


def test_each_process_reads_the_rows_that_lie_on_its_devices():
    """Whatever the order of the devices in the mesh, row r of the global batch is row r, and each process can fetch it
    whole. And a checkpoint is due for all processes when the clock of any has run out."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = str(s.getsockname()[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", PROCESS, port]
    runs = [subprocess.Popen([*command, str(i)], env=environment) for i in range(2)]
    assert [run.wait(120) for run in runs] == [0, 0]


def test_uneven_batch_is_an_error():
    with pytest.raises(UserError, match="12 rows cannot be split evenly over 8 devices"):
        global_batch(np.zeros((12, 3), np.float32), make_mesh(sizes(2, 4)))
    with pytest.raises(UserError, match="12 rows cannot be split evenly over 8 devices"):
        own_rows(make_mesh(sizes(2, 4)), 12)


def test_gather_makes_parameters_whole():
    mesh = make_mesh(sizes(2, 4))
    weight = np.arange(2**14, dtype=np.float32)
    split = jax.device_put(weight, param_shardings(weight, mesh))
    whole = jax.jit(lambda w: gather_params(w, mesh))(split)
    assert split.addressable_shards[0].data.shape == (2**12,)
    assert whole.addressable_shards[0].data.shape == (2**14,) and np.array_equal(whole, weight)


def test_drawing_splits_kernels_and_tables_but_never_over_layers():
    shapes = {
        "a": {"kernel": (3, 3, 64, 128), "bias": (2**14,)},
        "b": {"kernel": (8, 64, 128), "bias": (8, 2**12)},  # of eight layers
        "c": {"kernel": (8, 63, 129)},  # only the number of layers divides
        "d": {"embedding": (1001, 64)},
    }
    tree = {
        layer: {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in leaves.items()}
        for layer, leaves in shapes.items()
    }
    assert specs(split_kernels(tree, make_mesh(sizes(2, 4)))) == {
        "a": {"kernel": P(None, None, "fsdp", None), "bias": P()},
        "b": {"kernel": P(None, "fsdp", None), "bias": P()},
        "c": {"kernel": P()},
        "d": {"embedding": P(None, "fsdp")},
    }
