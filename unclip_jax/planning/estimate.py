"""Estimates how long a step takes at best, from what it must do and what a chip can do.

Each of these takes at least so long, and nothing says that they overlap well; the step takes the longest of them:

    compute      all FLOPs, those done twice included, at the chip's peak
    memory       bytes to and from memory, at its bandwidth
    collectives  bytes to other chips, over all links at once
    cycles       the TPU compiler's estimate for each operation, which knows how well it fills the chip; waiting for
                 other chips and lookups in tables are not in it; kernels of our own, of which it has no estimate, are
                 taken to run at half of the peak

MFU is FLOPs by the model's formula, each done once, as a share of what the chip could do in that time.
"""

from typing import NamedTuple

from unclip_jax.planning.chips import Chip
from unclip_jax.planning.compiling import Compiled

KERNELS = 0.5  # of the peak


class Estimate(NamedTuple):
    """Seconds that one call takes at least, by what it is bound by."""

    compute: float
    memory: float
    collectives: float
    cycles: float  # 0: the compiler does not estimate any

    @property
    def seconds(self) -> float:
        """The longest."""
        return max(self)

    @property
    def bound(self) -> str:
        """Name of the limiting term."""
        return max(self._asdict().items(), key=lambda item: item[1])[0]


def estimate(program: Compiled, chip: Chip, chips: int) -> Estimate:
    """Estimates a program that runs on so many chips."""
    return Estimate(
        compute=program.executed / chips / chip.flops,
        memory=program.moved / chip.hbm_bytes,
        collectives=sum(each.sent for each in program.collectives) / chip.link_bytes,
        cycles=_cycles(program, chip),
    )


def _cycles(program: Compiled, chip: Chip) -> float:
    if not program.cycles:
        return 0.0
    return program.cycles / chip.clock + program.kernel_flops / (KERNELS * chip.flops)


def mfu(flops: float, seconds: float, chip: Chip, chips: int) -> float:
    """Share of the peak; flops: of all chips together."""
    return flops / (seconds * chips * chip.flops)
