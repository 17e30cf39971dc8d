"""Checks before a run compiles anything, and a watchdog while it runs.

The processes of a run find each other, JAX must run on the platform that was asked for, and all processes must agree on
code, versions and config. When one process of many fails alone, the others wait for a collective that never comes, or
train something else. So whatever goes wrong ends every process, with a line that says what it was.
"""

import contextlib
import ctypes
import faulthandler
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import unclip_jax
from unclip_jax.config import PLACES, flat_items
from unclip_jax.errors import StorageError, UserError

PLATFORMS = {"tpu": "tpu", "gpu": "cuda", "cpu": "cpu"}  # --platform → JAX's name for it
ACCELERATORS = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin")  # packages: who has one wants an accelerator
HEARTBEAT_SECONDS = 15  # after which the others notice that a process has died
OTHERS = (
    "another process of this run has died, or this one has: look for the first error in the logs of all hosts; the "
    "same command on all of them goes on from the last checkpoint"
)
FLAGS = {  # of a command that several processes run together, for `joined`
    "platform": (str, "", "tpu, gpu or cpu: run on nothing else; empty: on what is there"),
    "coordinator": (str, "", "HOST:PORT of process 0, where no cluster tells it"),
    "processes": (int, -1, "their number"),
    "process": (int, -1, "which of them this is, from 0"),
    "wait": (int, 300, "seconds in which all processes must have come"),
}
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

_on_abort: Any = None  # a C callback, which must live as long as the process


@contextlib.contextmanager
def joined(flags: Any) -> Iterator[None]:
    """Joins the processes of a run on the platform that FLAGS say; an error within the context ends all of them."""
    join(flags.coordinator, flags.processes, flags.process, flags.wait)
    check_platform(flags.platform)
    try:
        yield
    except BaseException as error:
        # On a full disk, what is still open would print its own errors while an orderly exit closes it.
        if jax.process_count() > 1 or isinstance(error, StorageError):
            end_all(error)
        raise


def join(coordinator: str, processes: int, process: int, wait: int) -> None:
    """Joins the processes of a run, as Cloud TPU or SLURM describe them or as given; without either it stays alone.

    coordinator: HOST:PORT of process 0, or "" to detect it.
    processes, process: how many there are, and which one this is, from 0; or -1 to detect both.
    wait: seconds in which all of them must have joined; otherwise those that did exit with an error.

    Call it before anything asks JAX for devices. Raises UserError when the arguments do not fit together.
    """
    given = (coordinator != "", processes >= 0, process >= 0)
    if any(given) and not all(given):
        raise UserError("--coordinator, --processes and --process belong together: give all three, or none")
    if not 1 <= wait <= 10**6:
        raise UserError(f"--wait={wait}: expected seconds, from 1 to 1,000,000")
    if all(given) and not (process < processes <= 2**20 and ":" in coordinator):
        raise UserError(
            f"--coordinator={coordinator} --processes={processes} --process={process}: expected HOST:PORT and a "
            "process below their number, counted from 0"
        )

    # A timer of our own, because JAX's timeout aborts with its C++ stack in place of a message.
    message = (
        f"not all processes of this run came within {wait} seconds: start the same command on every host, and look at "
        "the logs of those that ended"
    )
    late = threading.Timer(wait, _leave, [message])
    late.daemon = True
    late.start()
    _say_when_another_dies()

    # Two errors of JAX's are no errors here: there is no cluster, or this program has used JAX before.
    initialize = functools.partial(
        jax.distributed.initialize,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        initialization_timeout=wait + 60,
    )
    try:
        if all(given):
            initialize(coordinator, processes, process)
        else:
            initialize()
    except ValueError as error:
        if all(given) or "should be defined" not in str(error):
            raise UserError(f"the processes of this run cannot be joined: {error}") from error
    except RuntimeError as error:
        if all(given) or "must be called before" not in str(error):
            raise UserError(f"the processes of this run cannot be joined: {' '.join(str(error).split())}") from error
    finally:
        late.cancel()


def check_platform(wanted: str) -> None:
    """Raises UserError unless JAX runs on `wanted`: "tpu", "gpu" or "cpu".

    "" admits any platform, but not the CPU where an accelerator's package is installed and nobody asked for the CPU:
    JAX itself falls back to it with no more than a warning.
    """
    if wanted and wanted not in PLATFORMS:
        raise UserError(f"--platform={wanted}: expected one of {', '.join(PLATFORMS)}")
    if wanted:
        jax.config.update("jax_platforms", PLATFORMS[wanted])

    try:
        found = jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # the latter where not even a plugin is installed
        asked = f"--platform={wanted}" if wanted else f"JAX_PLATFORMS={jax.config.jax_platforms}"
        why = " ".join(str(error).split())[:500] or "it needs unclip_jax installed with [cuda] or [tpu]"
        raise UserError(f"{asked}, but JAX finds none: {why}") from error

    installed = [name for name in ACCELERATORS if importlib.util.find_spec(name)]
    if found == "cpu" and installed and "cpu" not in (jax.config.jax_platforms or ""):
        raise UserError(
            f"{installed[0]} is installed, but JAX finds no device for it and would train on the CPU: is another "
            "process using it? --platform=cpu says that the CPU is meant"
        )


def facts(config: dict[str, Any]) -> dict[str, Any]:
    """Collects what all processes of a run must agree on: code, versions, devices, and each key of the config but for
    names of places, which may differ from host to host."""
    return {"code": _code(), **versions()} | {
        "platform": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "local devices": jax.local_device_count(),
        **{f"config.{key}": value for key, value in flat_items(config) if key not in PLACES},
    }


def versions() -> dict[str, str]:
    """This library's version and those of the packages that its numbers depend on."""
    return {"unclip_jax": unclip_jax.__version__} | {name: importlib.metadata.version(name) for name in PACKAGES}


def agree(values: Mapping[str, Any]) -> None:
    """Raises UserError, on every process, naming each of `values` that differs and which processes hold what.

    values: of types that JSON has. Every process must make the same calls. Takes no time in a run of one process.
    """
    if jax.process_count() == 1:
        return

    own = {"host": socket.gethostname(), "values": dict(values)}
    everyone = [json.loads(data) for data in gathered(json.dumps(own, sort_keys=True, default=str).encode())]
    first = everyone[0]["values"]
    wrong = []
    for process, other in enumerate(everyone):
        for key in sorted(first.keys() | other["values"].keys()):
            a, b = first.get(key), other["values"].get(key)
            if a != b:
                wrong.append(f"process {process} on {other['host']} has {key} = {b}, process 0 has {a}")
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(f"the processes of this run differ: {'; '.join(wrong[:5])}{more}")


def from_first(data: bytes) -> bytes:
    """Returns the bytes that process 0 gives, on every process. Takes no time in a run of one process."""
    if jax.process_count() == 1:
        return data
    from jax.experimental.multihost_utils import broadcast_one_to_all

    size = int(broadcast_one_to_all(np.int32(len(data))))
    own = np.zeros(size, np.uint8)
    if jax.process_index() == 0:
        own[:] = np.frombuffer(data, np.uint8)
    return np.asarray(broadcast_one_to_all(own)).tobytes()


def gathered(data: bytes) -> list[bytes]:
    """Gathers the bytes of all processes, in their order. Takes no time in a run of one process."""
    if jax.process_count() == 1:
        return [data]
    from jax.experimental.multihost_utils import process_allgather

    values = np.frombuffer(data, np.uint8)
    sizes = process_allgather(np.int32(values.size))
    rows = process_allgather(np.pad(values, (0, int(sizes.max()) - values.size)))
    return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]


def made_by_first(make: Callable[[], bytes]) -> bytes:
    """Has process 0 make bytes, and returns them on every process; the others wait."""
    return from_first(make() if jax.process_index() == 0 else b"")


def end_all(error: BaseException) -> None:
    """Ends this process over `error` without waiting for the others of the run, as an orderly exit would."""
    if isinstance(error, UserError):
        _leave(str(error), 2)
    traceback.print_exception(error)
    _leave(f"{OTHERS}; what this process met is above")


class Watchdog:
    """Ends the process after `minutes` without a `beat` (0: never), and prints where every thread stands."""

    def __init__(self, minutes: float):
        self._seconds, self._beat, self._over = 60 * minutes, time.monotonic(), threading.Event()
        if minutes:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def beat(self) -> None:
        """Reports that the run moves on."""
        self._beat = time.monotonic()

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(self._seconds / 20):
            silent = time.monotonic() - self._beat
            if silent > self._seconds:
                faulthandler.dump_traceback(all_threads=True)
                minutes = f"{silent / 60:.3g} minutes (train.watchdog_minutes)"
                _leave(f"no step for {minutes}: above is where each thread stands")
            # A thread that holds Python's lock for ever stops this thread too; this timer is C code and still fires.
            faulthandler.dump_traceback_later(2 * self._seconds, exit=True)
        faulthandler.cancel_dump_traceback_later()


def _say_when_another_dies() -> None:
    # JAX aborts this process when another one dies, and prints a C++ stack. A Python signal handler would never run
    # then, so this one is called from C.
    global _on_abort
    _on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: _leave(OTHERS))
    ctypes.CDLL(None).signal(signal.SIGABRT, _on_abort)


def _leave(line: str, status: int = 1) -> None:
    # Not sys.exit: it waits for the other processes in JAX's exit handler, and cannot end the process from a thread.
    print(f"error: {line}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(status)


def _code() -> str:
    """Hex digest of this library's source files."""
    sha, root = hashlib.sha256(), Path(unclip_jax.__file__).parent
    for path in sorted(root.rglob("*.py")):
        sha.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return sha.hexdigest()[:16]
