"""Compiles a traced program, reports every ten seconds that it still does, and keeps the compiler's facts about it.

libtpu knows a program's memory and its traffic between chips after a tenth of the compile time or less. The rest of the
time goes into machine code, from which the cycles of each operation come. With `quick`, nothing waits for that.
"""

import atexit
import contextlib
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax

from unclip_jax.planning import flops, traffic
from unclip_jax.planning.chips import GIB
from unclip_jax.planning.hlo import parse

SECONDS_BETWEEN_LINES = 10.0
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# Ends of the names of the files that libtpu writes: the first two early, the last when the machine code is done.
ALLOCATIONS, OPTIMISED, FINISHED = (
    "after_optimizations-buffer-assignment.txt",
    "after_optimizations.txt",
    "after_codegen.txt",
)


class Compiled(NamedTuple):
    """Facts about a compiled program, per device unless stated otherwise."""

    compile_seconds: float
    executed_flops: int  # by the formulas, of all devices together
    memory: dict[str, int]  # bytes: "arguments", "outputs", "aliased", "temporaries", "code"
    compiler_flops: float  # by the compiler's own count, which takes the body of a loop once; 0 if quick
    moved_bytes: float  # to and from memory
    collectives: list[traffic.Collective]
    cycles: int  # as the TPU compiler estimates; 0 where there is no estimate
    kernel_flops: int  # of this library's own kernels, which are not in `cycles`
    executable: jax.stages.Compiled | None  # None if quick


class TooLarge(Exception):
    """Refusal of a program that needs more memory than a chip has.

    hbm: bytes that it needs at least; 0 where the compiler does not say. compile_seconds: until the refusal.
    """

    def __init__(self, hbm: int, compile_seconds: float):
        super().__init__(f"needs {hbm / GIB:.1f} GiB of memory")
        self.hbm, self.compile_seconds = hbm, compile_seconds


def compile_program(
    traced: jax.stages.Traced,
    label: str,
    tpu: bool,
    quick: bool = False,
    options: Mapping[str, bool | int | str] | None = None,
) -> Compiled:
    """Compiles a program for the devices of its arguments. Raises TooLarge where their memory is too small.

    label: begins the lines that say how long it has been compiling.
    tpu: the devices are TPUs, whose compiler writes down what it knows.
    quick: return as soon as memory and traffic are known, without cycles and machine code (on TPUs alone). The compiler
        then works on in this process until the process ends, so a process that goes on should leave this to a child.
    options: for the compiler, beside its defaults.
    """
    quick, start = quick and tpu, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="unclip_jax_plan_", ignore_cleanup_errors=True) as folder, ticking(label):
        # libtpu itself writes the program's text: an older JAX may not be able to print the executable that it returns.
        dumps = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True} if tpu else {}
        compilation = _Compilation(traced, {**(options or {}), **dumps})
        compilation.start()

        # Wait for the end or, if quick, for the two early files: sizes that have not changed since mean they are whole.
        sizes = None
        while compilation.is_alive() and not (quick and sizes == (sizes := _early_sizes(folder)) and len(sizes) == 2):
            compilation.join(2.0)
        seconds = time.monotonic() - start

        error, executable = compilation.error, compilation.executable
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
            raise TooLarge(needed_bytes(str(error)), seconds) from None
        if error:
            raise error
        if compilation.is_alive():
            atexit.register(_leave)

        # The files vanish with the folder, so they are read here.
        text = _read_dump(folder, FINISHED) or _read_dump(folder, OPTIMISED)
        module = parse(text or executable.as_text())
        memory = _memory(executable) if executable else allocated_bytes(_read_dump(folder, ALLOCATIONS))
    return Compiled(
        compile_seconds=seconds,
        executed_flops=flops.executed_flops(traced.jaxpr),
        memory=memory,
        compiler_flops=(executable.cost_analysis() or {}).get("flops", 0.0) if executable else 0.0,
        moved_bytes=traffic.moved_bytes(module),
        collectives=traffic.collectives(module),
        cycles=sum(runs * operation.cycles for operation, runs, _ in module.launched()),
        kernel_flops=sum(runs * operation.kernel_flops for operation, runs, _ in module.launched()),
        executable=executable,
    )


class _Compilation(threading.Thread):
    """Compiles in a thread of its own, so that the caller can report progress, or leave before the end."""

    def __init__(self, traced: jax.stages.Traced, options: Mapping[str, bool | int | str]):
        super().__init__(daemon=True)
        self._traced, self._options = traced, options
        self.executable: jax.stages.Compiled | None = None
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self.executable = self._traced.lower().compile(compiler_options=dict(self._options) or None)
        except Exception as error:
            self.error = error


def _early_sizes(folder: str) -> list[int]:
    """Returns the sizes of those of the compiler's two early files that hold anything yet."""
    ends = (ALLOCATIONS, OPTIMISED)
    return [path.stat().st_size for end in ends for path in Path(folder).rglob(f"*{end}") if path.stat().st_size]


def _read_dump(folder: str, end: str) -> str:
    """Reads the compiler's file whose name ends so; "" if there is none."""
    found = sorted(Path(folder).rglob(f"*{end}"))
    return found[-1].read_text() if found else ""


def _leave() -> None:
    """Ends the process at once: an orderly end would crash while the compiler's thread is at work."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _memory(executable: jax.stages.Compiled) -> dict[str, int]:
    """Reads `Compiled.memory` from an executable."""
    stats = executable.memory_analysis()
    names = {"arguments": "argument", "outputs": "output", "aliased": "alias", "temporaries": "temp"}
    memory = {name: getattr(stats, f"{theirs}_size_in_bytes") for name, theirs in names.items()}
    return memory | {"code": stats.generated_code_size_in_bytes}


def allocated_bytes(text: str) -> dict[str, int]:
    """Reads `Compiled.memory` from libtpu's list of allocations; those in fusions (thread-local) take no memory."""
    memory = dict.fromkeys(("arguments", "outputs", "aliased", "temporaries", "code"), 0)
    for size, kind in re.findall(r"^allocation \d+: size (\d+), page 0, (.*)", text, re.MULTILINE):
        if not kind.startswith("thread-local"):
            place = "arguments" if kind.startswith("parameter") else "outputs" if "output" in kind else "temporaries"
            memory[place] += int(size)
    return memory


def needed_bytes(message: str) -> int:
    """Reads from a compiler's refusal how many bytes the program needs: the largest size in it; 0 where it has none."""
    found = [float(number) * UNITS[unit] for number, unit in re.findall(r"(\d+(?:\.\d+)?)([KMGT])\b", message)]
    return int(max(found, default=0))


@contextlib.contextmanager
def ticking(label: str) -> Iterator[None]:
    """Prints "label: N s" on stderr every SECONDS_BETWEEN_LINES while the context lasts."""
    done, start = threading.Event(), time.monotonic()

    def tell() -> None:
        while not done.wait(SECONDS_BETWEEN_LINES):
            print(f"{label}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
