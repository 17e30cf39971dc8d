"""What the benchmarks share: calls timed in turns, what is said of the times, the machine, tables and reports."""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

PACKAGES = ("jax", "flax", "optax", "numpy", "torch", "diffusers", "transformers", "pillow", "grain")


def in_turns(
    calls: dict[str, Callable[[], Any]], repeats: int, label: str, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of `repeats` rounds of all calls, one after the other, so that what else the machine does hits all alike.

    A call returns when its result is there. The first round, which may compile, is in "NAME first" and not counted.
    """
    seconds: dict[str, list[float]] = {}
    progress = Progress((repeats + 1) * len(calls), label)
    for turn in range(repeats + 1):
        for name, call in calls.items():
            start = clock()
            call()
            seconds.setdefault(name if turn else f"{name} first", []).append(clock() - start)
            progress.step()
    return seconds


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, least and quartiles of times, in seconds."""
    low, middle, high = np.percentile(seconds, [25, 50, 75])
    found = {"median": middle, "min": min(seconds), "quartile_1": low, "quartile_3": high, "repeats": len(seconds)}
    return {name: significant(value) for name, value in found.items()}


def significant(value: float, digits: int = 4) -> float:
    """Rounded to so many digits that mean something."""
    return float(f"{value:.{digits}g}")


class Progress:
    """A line on stderr now and then: how many steps of all are done, and how long the rest takes."""

    def __init__(self, total: int, label: str, every: float = 10.0):
        self._total, self._label, self._every = total, label, every
        self._done, self._start = 0, time.monotonic()
        self._next = self._start + every

    def step(self) -> None:
        """One more is done."""
        self._done += 1
        now = time.monotonic()
        if now >= self._next and self._done < self._total:
            left = (now - self._start) / self._done * (self._total - self._done)
            say(f"{self._label}: {self._done} of {self._total}, {left:.0f} s left")
            self._next = now + self._every


def say(line: str) -> None:
    """On stderr, at once."""
    print(line, file=sys.stderr, flush=True)


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def environment() -> dict[str, Any]:
    """Machine and versions."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = jax.devices()[0]
    return {
        "device": device.device_kind if device.platform != "cpu" else _processor(),
        "platform": device.platform,
        "devices": jax.device_count(),
        "cores": cores(),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "versions": versions,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def table(header: tuple[str, ...], rows: list[tuple]) -> str:
    """Of Markdown; numbers get four digits, None a dash."""

    def text(value):
        if value is None:
            return "–"
        return f"{value:,.4g}" if isinstance(value, float) else str(value)

    cells = [header, *([text(value) for value in row] for row in rows)]
    first, *others = (max(len(row[i]) for row in cells) for i in range(len(header)))
    cells.insert(1, ("-" * first, *("-" * (width - 1) + ":" for width in others)))
    aligned = [[row[0].ljust(first), *(c.rjust(w) for c, w in zip(row[1:], others, strict=True))] for row in cells]
    return "\n".join(f"| {' | '.join(row)} |" for row in aligned)


def parser(description: str, out: str) -> argparse.ArgumentParser:
    """With the flags that all have. out: the report's name, beside this file."""
    new = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    new.add_argument("--out", type=Path, default=Path(__file__).parent / out, help="the report")
    new.add_argument("--repeats", type=int, default=10, help="times each call is timed, after one that is not")
    new.add_argument("--seed", type=int, default=0)
    return new


def write(path: Path, report: dict) -> None:
    """The report, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2, default=str) + "\n")
    say(f"{path} written")
