"""Reports on stderr how far long work has come, and how long the rest will take."""

import sys
import time
from datetime import timedelta

from unclip_jax.paths import SECONDS_BETWEEN_LINES


class Progress:
    """Counts what is done, and says so every SECONDS_BETWEEN_LINES.

    label: begins each line. total: all that there is to do. unit: its name in the plural. done: how much of it an
    earlier run has done. speaks: whether anything is said.
    """

    def __init__(self, label: str, total: int, unit: str, done: int = 0, speaks: bool = True):
        self.total = total
        self._label, self._unit, self._speaks = label, unit, speaks
        self._done = self._before = done
        self._began = self._said = time.monotonic()
        if done:
            self.say(f"{done:,} of {total:,} {unit} were done before")

    def advance(self, count: int = 1) -> None:
        """Counts what is done now."""
        self._done += count
        now = time.monotonic()
        if now - self._said > SECONDS_BETWEEN_LINES:
            self._said = now
            speed = (self._done - self._before) / (now - self._began)
            left = timedelta(seconds=round((self.total - self._done) / speed))
            self.say(f"{self._done:,} of {self.total:,} {self._unit}, {speed:.4g} {self._unit}/s, left {left}")

    def say(self, line: str) -> None:
        """Prints a line after the label."""
        if self._speaks:
            print(f"{self._label}: {line}", file=sys.stderr, flush=True)
