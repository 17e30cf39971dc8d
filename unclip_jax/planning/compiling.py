"""Compiles a traced program, says every ten seconds that it still does, and keeps what the compiler tells of it.

After a tenth of the time or less, libtpu knows what a program takes of memory and sends to other chips; the rest goes
into machine code, and gives the cycles of each operation. `quick` does not wait for it.
"""

import atexit
import contextlib
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from unclip_jax.planning import flops, traffic
from unclip_jax.planning.chips import GIB
from unclip_jax.planning.hlo import parse

TICK = 10.0  # seconds between lines
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# What libtpu writes, by what its files' names end with: first these two, the rest when the machine code is there.
ALLOCATIONS, OPTIMISED, FINISHED = (
    "after_optimizations-buffer-assignment.txt",
    "after_optimizations.txt",
    "after_codegen.txt",
)


class Compiled(NamedTuple):
    """Facts about a compiled program; of each device alone, unless it says otherwise."""

    seconds: float  # that compiling took
    executed: int  # FLOPs by the formulas, of all devices together
    memory: dict[str, int]  # bytes: arguments, outputs, aliased, temporaries, code
    flops: float  # by the compiler's own count, loop bodies once
    moved: float  # bytes to and from memory
    collectives: list[traffic.Collective]
    cycles: int  # as the TPU compiler estimates; 0 where it does not
    kernel_flops: int  # of kernels of our own, which are not in the cycles
    executable: Any  # jax.stages.Compiled; None if quick


class TooLarge(Exception):
    """A program that needs more memory than a chip has. `hbm`: at least so many bytes; 0 where nothing says."""

    def __init__(self, hbm: int, seconds: float):
        super().__init__(f"needs {hbm / GIB:.1f} GiB of memory")
        self.hbm, self.seconds = hbm, seconds


def compiled(
    traced: Any, label: str, tpu: bool, quick: bool = False, options: dict[str, Any] | None = None
) -> Compiled:
    """Compiles for the devices of the program's arguments. Raises TooLarge.

    tpu: for TPUs, whose compiler tells more. quick: of TPUs without cycles and machine code, which leaves the compiler
    to itself until the process ends; a process that should live on leaves this to another. options: to the compiler.
    """
    quick, start = quick and tpu, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="unclip_jax_plan_", ignore_cleanup_errors=True) as folder, ticking(label):
        # The text of a program is asked of libtpu itself: what it hands over, an older JAX may not be able to print.
        dumps = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True} if tpu else {}
        compilation = _Compilation(traced, (options or {}) | dumps)
        compilation.start()
        sizes = None
        while compilation.is_alive() and not (quick and sizes == (sizes := _sizes(folder)) and len(sizes) == 2):
            compilation.join(2.0)  # files that have not grown since are complete
        seconds = time.monotonic() - start
        if isinstance(compilation.error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(compilation.error):
            raise TooLarge(needed(str(compilation.error)), seconds) from None
        if compilation.error:
            raise compilation.error
        if compilation.is_alive():
            atexit.register(_leave)
        text = _dumped(folder, FINISHED) or _dumped(folder, OPTIMISED)
        program = parse(text or compilation.executable.as_text())
        memory = (
            _memory(compilation.executable) if compilation.executable else allocations(_dumped(folder, ALLOCATIONS))
        )
    return Compiled(
        seconds=seconds,
        executed=flops.executed(traced.jaxpr),
        memory=memory,
        flops=(compilation.executable.cost_analysis() or {}).get("flops", 0.0) if compilation.executable else 0.0,
        moved=traffic.moved(program),
        collectives=traffic.collectives(program),
        cycles=sum(times * operation.cycles for operation, times, _ in program.running()),
        kernel_flops=sum(times * operation.kernel_flops for operation, times, _ in program.running()),
        executable=compilation.executable,
    )


class _Compilation(threading.Thread):
    """Compiles beside, so that the caller can tell the time, or leave."""

    def __init__(self, traced, options):
        super().__init__(daemon=True)
        self._traced, self._options = traced, options
        self.executable = self.error = None

    def run(self):
        try:
            self.executable = self._traced.lower().compile(compiler_options=self._options or None)
        except Exception as error:
            self.error = error


def _sizes(folder: str) -> list[int]:
    """Sizes of the first files that the compiler writes there."""
    ends = (ALLOCATIONS, OPTIMISED)
    return [path.stat().st_size for end in ends for path in Path(folder).rglob(f"*{end}") if path.stat().st_size]


def _dumped(folder: str, end: str) -> str:
    """The file that the compiler wrote there; "" if it has not."""
    found = sorted(Path(folder).rglob(f"*{end}"))
    return found[-1].read_text() if found else ""


def _leave():
    """Ends the process with a compiler still at work, which would not survive an orderly end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _memory(executable) -> dict[str, int]:
    stats = executable.memory_analysis()
    names = {"arguments": "argument", "outputs": "output", "aliased": "alias", "temporaries": "temp"}
    memory = {name: getattr(stats, f"{theirs}_size_in_bytes") for name, theirs in names.items()}
    return memory | {"code": stats.generated_code_size_in_bytes}


def allocations(text: str) -> dict[str, int]:
    """Bytes as of Compiled.memory, from libtpu's list of allocations; what lies inside of fusions takes no memory."""
    memory = dict.fromkeys(("arguments", "outputs", "aliased", "temporaries", "code"), 0)
    for size, what in re.findall(r"^allocation \d+: size (\d+), page 0, (.*)", text, re.MULTILINE):
        if not what.startswith("thread-local"):
            place = "arguments" if what.startswith("parameter") else "outputs" if "output" in what else "temporaries"
            memory[place] += int(size)
    return memory


def needed(message: str) -> int:
    """Bytes that a compiler's refusal speaks of."""
    found = [float(number) * UNITS[unit] for number, unit in re.findall(r"(\d+(?:\.\d+)?)([KMGT])\b", message)]
    return int(max(found, default=0))


@contextlib.contextmanager
def ticking(label: str) -> Iterator[None]:
    """Says every TICK seconds, inside of the context, how long it has been."""
    done, start = threading.Event(), time.monotonic()

    def tell():
        while not done.wait(TICK):
            print(f"{label}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
