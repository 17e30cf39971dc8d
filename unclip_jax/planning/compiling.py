"""Compiles a traced program, says every ten seconds that it still does, and keeps what the compiler tells of it."""

import contextlib
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


class Compiled(NamedTuple):
    """What is known of a compiled program; of each device alone, unless it says otherwise."""

    seconds: float  # that compiling took
    executed: int  # FLOPs by the formulas, of all devices together
    memory: dict[str, int]  # bytes: arguments, outputs, aliased, temporaries, code
    flops: float  # by the compiler's own count, loop bodies once
    moved: float  # bytes to and from memory
    collectives: list[traffic.Collective]
    cycles: int  # as the TPU compiler estimates; 0 where it does not
    executable: Any  # jax.stages.Compiled

    @property
    def hbm(self) -> int:
        """Bytes that must be there while it runs."""
        m = self.memory
        return m["arguments"] + m["outputs"] - m["aliased"] + m["temporaries"] + m["code"]


class TooLarge(Exception):
    """A program that needs more memory than a chip has. `hbm`: at least so many bytes; 0 where nothing says."""

    def __init__(self, hbm: int, seconds: float):
        super().__init__(f"needs {hbm / GIB:.1f} GiB of memory")
        self.hbm, self.seconds = hbm, seconds


def compiled(traced: Any, label: str, tpu: bool) -> Compiled:
    """Compiles for the devices of the program's arguments. Raises TooLarge."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="unclip_jax_plan_") as folder, ticking(label):
        # The text of a program is asked of libtpu itself: what it hands over, an older JAX may not be able to print.
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True} if tpu else None
        try:
            executable = traced.lower().compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise TooLarge(needed(str(error)), time.monotonic() - start) from None
        seconds = time.monotonic() - start
        dumps = sorted(Path(folder).rglob("*after_codegen.txt"))
        program = parse(dumps[-1].read_text() if dumps else executable.as_text())
    stats = executable.memory_analysis()
    names = {"arguments": "argument", "outputs": "output", "aliased": "alias", "temporaries": "temp"}
    memory = {name: getattr(stats, f"{ours}_size_in_bytes") for name, ours in names.items()}
    memory["code"] = stats.generated_code_size_in_bytes
    return Compiled(
        seconds=seconds,
        executed=flops.executed(traced.jaxpr),
        memory=memory,
        flops=(executable.cost_analysis() or {}).get("flops", 0.0),
        moved=traffic.moved(program),
        collectives=traffic.collectives(program),
        cycles=sum(times * operation.cycles for operation, times, _ in program.running()),
        executable=executable,
    )


def needed(message: str) -> int:
    """Bytes that a compiler's refusal speaks of."""
    found = [float(number) * UNITS[unit] for number, unit in re.findall(r"(\d+(?:\.\d+)?)([KMGT])\b", message)]
    return int(max(found, default=0))


@contextlib.contextmanager
def ticking(label: str) -> Iterator[None]:
    """Inside, a line every TICK seconds tells how long it has been."""
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
