"""Chips that plans are made for: their makers' numbers, and the devices of TPU slices that need not exist.

TPUs: cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e (peak, HBM, bandwidth between chips), read in 2026; a program
may use as much HBM as libtpu 0.0.52 names as the limit when it refuses a program. GPUs: NVIDIA's data sheets, dense
products, the SXM parts of A100 (80 GB), H100 and H200; a program may use the share `cli.GPU_SHARE` of their memory.
"""

import importlib
import math
import os
import re
from typing import Any, NamedTuple

import jax

from unclip_jax.cli import GPU_SHARE
from unclip_jax.errors import UserError

GIB = 2**30
# Without these, libtpu asks a metadata server which TPU it is on, and serves only one process of a machine.
LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}


class Chip(NamedTuple):
    """One chip, which JAX sees as one device. Speeds are peaks."""

    peak_flops: float  # FLOPs per second of bfloat16 products; 0: the chip has no bfloat16
    hbm_gib: float  # memory that a program may use, in GiB
    hbm_bandwidth: float  # bytes per second to and from the memory
    link_bandwidth: float  # bytes per second to other chips, one way, over all links together
    clock_hz: float = 0.0  # clock of the cycles that the TPU compiler estimates; 0: nothing estimates cycles
    slice_axes: int = 0  # number of axes of a TPU slice's shape; 0: GPUs of one machine, which are only counted
    peak_flops_float32: float = 0.0  # FLOPs per second of float32 products, TF32 included; 0: `peak_flops`

    def computing_in(self, dtype: str) -> "Chip":
        """Returns the chip with `peak_flops` of a config's dtype, "float32" or "bfloat16"."""
        slower = dtype == "float32" or not self.peak_flops
        return self._replace(peak_flops=self.peak_flops_float32) if slower and self.peak_flops_float32 else self


# A TPU's clock is its peak / (2 · elements of its matrix units): 8 units of 128 × 128 in v4 and v5p, 4 such units in
# v5e, 4 units of 256 × 256 in v6e.
CHIPS = {
    "v4": Chip(275e12, 30.75, 1228e9, 300e9, 1.05e9, 3),
    "v5e": Chip(197e12, 15.75, 819e9, 200e9, 1.5e9, 2),
    "v5p": Chip(459e12, 95.73, 2765e9, 600e9, 1.75e9, 3),
    "v6e": Chip(918e12, 31.24, 1640e9, 400e9, 1.75e9, 2),
    "t4": Chip(0.0, GPU_SHARE * 14.75, 320e9, 16e9, peak_flops_float32=8.1e12),
    "l4": Chip(121e12, GPU_SHARE * 22.0, 300e9, 32e9, peak_flops_float32=60e12),
    "a100": Chip(312e12, GPU_SHARE * 79.2, 2039e9, 300e9, peak_flops_float32=156e12),
    "h100": Chip(989e12, GPU_SHARE * 79.1, 3352e9, 450e9, peak_flops_float32=494e12),
    "h200": Chip(989e12, GPU_SHARE * 141.0, 4800e9, 450e9, peak_flops_float32=494e12),
}
MAX_GPUS = 8  # of one machine
CHIP_OF_DEVICE_KIND = {  # beginning of `jax.Device.device_kind` → chip
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
    """Returns the chip that a topology such as "v5p:4x4x4", "2xv5p:4x4x4" (two slices) or "h100:8" names, and the
    number of chips.

    Raises UserError for an unknown chip, and for a shape or number that does not belong to it.
    """
    slices, kind, shape = parse_slices(name)
    if kind not in CHIPS:
        slices, gpus = (", ".join(k for k in CHIPS if bool(CHIPS[k].slice_axes) == tpu) for tpu in (True, False))
        raise UserError(f"topology {name!r}: expected local, one of {slices} with a shape, such as v5p:4x4x4, or "
                        f"one of {gpus} with a number, such as h100:8")  # fmt: skip
    chip = CHIPS[kind]
    if not chip.slice_axes:
        if slices > 1:
            raise UserError(f"topology {name!r}: GPUs are those of one machine, such as {kind}:8")
        if not shape.isdecimal() or not 1 <= int(shape) <= MAX_GPUS:
            raise UserError(f"topology {name!r}: expected the number of GPUs of one machine, {kind}:1 to "
                            f"{kind}:{MAX_GPUS}")  # fmt: skip
        return chip, int(shape)
    example = "x".join("4" * chip.slice_axes)
    if not re.fullmatch(r"\d+(x\d+)*", shape) or shape.count("x") + 1 != chip.slice_axes or "0" in shape.split("x"):
        raise UserError(f"topology {name!r}: expected {chip.slice_axes} sizes for {kind}, such as {kind}:{example}")
    return chip, slices * math.prod(int(size) for size in shape.split("x"))


def parse_slices(name: str) -> tuple[int, str, str]:
    """Splits a topology into the number of slices, 1 where it says none, the kind of chip, and its shape."""
    kind, _, shape = name.partition(":")
    several = re.fullmatch(r"([1-9]\d*)x(.+)", kind)
    return (int(several[1]), several[2], shape) if several else (1, kind, shape)


def slice_devices(name: str) -> list[jax.Device]:
    """Returns the devices of the TPU slice or slices `name`, such as "v5p:4x4x4", to compile for; it need not exist.

    Raises UserError where libtpu, which has the compiler, is not installed, and for a slice that cannot exist.
    """
    for variable, value in LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    try:
        importlib.import_module("libtpu")
    except ImportError:
        raise UserError("the TPU compiler is not installed: pip install 'jax[tpu]' (it needs no TPU)") from None
    from jax.experimental import topologies

    # Otherwise each of a v4 chip's two cores would be a device.
    slices, kind, shape = parse_slices(name)
    options: dict[str, Any] = {"chip_config_name": "megacore"} if kind == "v4" else {}
    options |= {"num_slices": slices} if slices > 1 else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{shape}", **options).devices)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"topology {name!r} does not exist: {str(error).splitlines()[0]}") from error


def known_chip(kind: str) -> Chip | None:
    """Finds the chip of a `jax.Device.device_kind`, such as "TPU v5 lite"; None for one that is not listed here."""
    # Slower relatives have names that begin alike: L40S, H100 PCIe, A100-PCIE-40GB, H100 NVL.
    if re.search(r"PCIe|NVL\b", kind, re.IGNORECASE):
        return None
    names = sorted((name for name in CHIP_OF_DEVICE_KIND if re.match(rf"{name}(?!\d)", kind)), key=len)
    return CHIP_OF_DEVICE_KIND[names[-1]] if names else None
