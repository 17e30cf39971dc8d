"""Measures what a program takes on the devices of this machine."""

import os
import time

import jax

from unclip_jax.planning.compiling import Compiled, ticking
from unclip_jax.planning.programs import Program, random_arguments
from unclip_jax.training.state import TrainState

CALLS = 5  # that are timed, after one that is not


def memory_limit() -> int:
    """Bytes that programs may use of each device; devices that are parts of a CPU share the machine's."""
    stats = jax.devices()[0].memory_stats() or {}
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return stats.get("bytes_limit") or whole // jax.device_count()


def seconds(program: Program, compiled: Compiled) -> list[float]:
    """Seconds of each of CALLS calls on random data."""
    with ticking("making parameters and data"):
        first, *rest = jax.block_until_ready(random_arguments(program))
    found = []
    with ticking("timing"):
        for _ in range(CALLS + 1):
            start = time.monotonic()
            result = jax.block_until_ready(compiled.executable(first, *rest))
            found.append(time.monotonic() - start)
            first = result[0] if isinstance(first, TrainState) else first  # the old state is given away
    return found[1:]
