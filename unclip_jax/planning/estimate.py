"""Estimates how long a step takes at best, from the work of its program and the peak speeds of a chip.

Each of these takes at least so long. Nothing says that they overlap well, so a step takes at least the longest of them:

    compute      all FLOPs, recomputed ones included, at the chip's peak
    memory       bytes to and from memory, at the memory's bandwidth
    collectives  bytes to other chips, over all links at once
    cycles       the TPU compiler's estimates for each operation, which know how well it fills the chip; they leave out
                 waiting for other chips and lookups in tables, and this library's own kernels, which are taken to run
                 at half of the peak

MFU (model FLOPs utilisation) is the FLOPs by the model's formula, each counted once, as a share of the FLOPs that the
chip could do in that time.
"""

from typing import NamedTuple

from unclip_jax.planning.chips import Chip
from unclip_jax.planning.compiling import Compiled
from unclip_jax.planning.traffic import BETWEEN_SLICES

KERNEL_MFU = 0.5  # share of the peak at which kernels are taken to run


class Estimate(NamedTuple):
    """Seconds that one call takes at least, by the resource that limits it."""

    compute: float
    memory: float
    collectives: float
    cycles: float  # 0: the compiler estimates none

    @property
    def seconds(self) -> float:
        """Seconds of the limiting resource."""
        return max(self)

    @property
    def bound(self) -> str:
        """Name of the limiting resource."""
        return max(self._asdict().items(), key=lambda item: item[1])[0]


def estimate(program: Compiled, chip: Chip, chips: int) -> Estimate:
    """Estimates a call of a program that runs on so many chips of a kind.

    The network between slices is left out: how fast it is depends on the hosts.
    """
    within = (each.sent_bytes for each in program.collectives if each.kind != BETWEEN_SLICES)
    return Estimate(
        compute=program.executed_flops / chips / chip.peak_flops,
        memory=program.moved_bytes / chip.hbm_bandwidth,
        collectives=sum(within) / chip.link_bandwidth,
        cycles=_cycle_seconds(program, chip),
    )


def _cycle_seconds(program: Compiled, chip: Chip) -> float:
    """Seconds of the estimated cycles and of the kernels, which have no such estimate; 0 without any estimate."""
    if not program.cycles:
        return 0.0
    return program.cycles / chip.clock_hz + program.kernel_flops / (KERNEL_MFU * chip.peak_flops)


def mfu(flops: float, seconds: float, chip: Chip) -> float:
    """Model FLOPs utilisation in [0, 1]. flops: of one chip in so many seconds, each counted once."""
    return flops / (seconds * chip.peak_flops)
