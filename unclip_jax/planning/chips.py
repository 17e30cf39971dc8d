"""Chips that plans are made for: what their makers say of them, and slices of TPUs to compile for.

TPU numbers: cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e (peak, HBM, bandwidth between chips), as of 2026. What of
the HBM programs may use is what libtpu 0.0.52 itself gives as its limit when a program needs more. GPUs: NVIDIA's data
sheets, of A100 (80 GB), H100 and H200 the SXM parts, dense products; programs may use `cli.GPU_SHARE` of their memory.
"""

import importlib
import math
import os
import re
from typing import NamedTuple

import jax

from unclip_jax.cli import GPU_SHARE
from unclip_jax.errors import UserError

GIB = 2**30
# Without these, libtpu asks a metadata server who it is, and lets one process of a machine in.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}


class Chip(NamedTuple):
    """One device as JAX sees it."""

    flops: float  # peak, bfloat16 products, per second; 0: it has none
    hbm_gib: float  # that programs may use
    hbm_bytes: float  # bytes per second to and from HBM
    link_bytes: float  # bytes per second to other chips, over all links, one way
    clock: float = 0.0  # cycles per second, of those that the compiler estimates; 0: it does not
    axes: int = 0  # of a slice's shape; 0: GPUs of one machine, which have a number alone
    flops32: float = 0.0  # peak, float32 products, with TF32 where there is; 0: they are made of bfloat16 ones

    def computing_in(self, dtype: str) -> "Chip":
        """Returns the chip with the peak of a config's dtype, "float32" or "bfloat16"."""
        slower = dtype == "float32" or not self.flops
        return self._replace(flops=self.flops32) if slower and self.flops32 else self


# The clock is peak / (2 · elements of a chip's matrix units): 8 units of 128 × 128 in v4 and v5p, 4 in v5e; in v6e 4 of
# 256 × 256.
CHIPS = {
    "v4": Chip(275e12, 30.75, 1228e9, 300e9, 1.05e9, 3),
    "v5e": Chip(197e12, 15.75, 819e9, 200e9, 1.5e9, 2),
    "v5p": Chip(459e12, 95.73, 2765e9, 600e9, 1.75e9, 3),
    "v6e": Chip(918e12, 31.24, 1640e9, 400e9, 1.75e9, 2),
    "t4": Chip(0.0, GPU_SHARE * 14.75, 320e9, 16e9, flops32=8.1e12),
    "l4": Chip(121e12, GPU_SHARE * 22.0, 300e9, 32e9, flops32=60e12),
    "a100": Chip(312e12, GPU_SHARE * 79.2, 2039e9, 300e9, flops32=156e12),
    "h100": Chip(989e12, GPU_SHARE * 79.1, 3352e9, 450e9, flops32=494e12),
    "h200": Chip(989e12, GPU_SHARE * 141.0, 4800e9, 450e9, flops32=494e12),
}
GPUS_OF_A_MACHINE = 8
DEVICES = {  # by what JAX calls a device that is there
    "TPU v4": CHIPS["v4"],
    "TPU v5 lite": CHIPS["v5e"],
    "TPU v5": CHIPS["v5p"],
    "TPU v6 lite": CHIPS["v6e"],
    "NVIDIA A100": CHIPS["a100"],
    "NVIDIA H100": CHIPS["h100"],
    "NVIDIA H200": CHIPS["h200"],
    "NVIDIA L4": CHIPS["l4"],
    "Tesla T4": CHIPS["t4"],
}


def parse_topology(name: str) -> tuple[Chip, int]:
    """Returns the chip of "v5p:4x4x4" or "h100:8", and the number of chips. Raises UserError for other names."""
    kind, _, shape = name.partition(":")
    if kind not in CHIPS:
        slices, gpus = (", ".join(k for k in CHIPS if bool(CHIPS[k].axes) == tpu) for tpu in (True, False))
        raise UserError(f"topology {name!r}: expected local, one of {slices} with a shape, such as v5p:4x4x4, or "
                        f"one of {gpus} with a number, such as h100:8")  # fmt: skip
    chip = CHIPS[kind]
    if not chip.axes:
        if not shape.isdecimal() or not 1 <= int(shape) <= GPUS_OF_A_MACHINE:
            raise UserError(f"topology {name!r}: expected the number of GPUs of one machine, {kind}:1 to "
                            f"{kind}:{GPUS_OF_A_MACHINE}")  # fmt: skip
        return chip, int(shape)
    example = "x".join("4" * chip.axes)
    if not re.fullmatch(r"\d+(x\d+)*", shape) or shape.count("x") + 1 != chip.axes or "0" in shape.split("x"):
        raise UserError(f"topology {name!r}: expected {chip.axes} sizes for {kind}, such as {kind}:{example}")
    return chip, math.prod(int(size) for size in shape.split("x"))


def slice_devices(name: str) -> list:
    """The devices of a TPU slice that need not exist, for compiling alone. Raises UserError where none can be had."""
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    try:
        importlib.import_module("libtpu")
    except ImportError:
        raise UserError("the TPU compiler is not installed: pip install 'jax[tpu]' (it needs no TPU)") from None
    from jax.experimental import topologies

    # A v4 chip's two cores would be two devices otherwise.
    options = {"chip_config_name": "megacore"} if name.startswith("v4") else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"topology {name!r} does not exist: {str(error).splitlines()[0]}") from error


def known_chip(kind: str) -> Chip | None:
    """Finds the chip that JAX calls so; None where nothing is known of it, as of a CPU."""
    names = sorted((name for name in DEVICES if kind.startswith(name)), key=len)
    return DEVICES[names[-1]] if names else None
