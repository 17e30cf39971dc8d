"""Measures programs on the devices of this machine: the memory that there is, and seconds of calls."""

import os
import time

import jax

from unclip_jax.planning.compiling import Compiled, ticking
from unclip_jax.planning.programs import Program, random_arguments

CALLS = 5  # timed, after one call that is not


def memory_limit() -> int:
    """Bytes that programs may use on each device; the devices of a CPU share the machine's memory."""
    stats = jax.devices()[0].memory_stats() or {}
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return stats.get("bytes_limit") or whole // jax.device_count()


def time_calls(program: Program, compiled: Compiled) -> list[float]:
    """Runs a program on random data and returns the seconds of each of CALLS calls."""
    with ticking("making parameters and data"):
        first, *rest = jax.block_until_ready(random_arguments(program))
    found = []
    with ticking("timing"):
        for _ in range(CALLS + 1):
            start = time.monotonic()
            result = jax.block_until_ready(compiled.executable(first, *rest))
            found.append(time.monotonic() - start)
            # A train step gives its state's memory to the new state, which the next step takes.
            first = result[0] if program.trains else first
    return found[1:]
