"""Looks on while the models of a cascade draw: shows what is drawn so far, or names models and steps in a trace."""

import contextlib
from pathlib import Path
from typing import ClassVar

import jax
import numpy as np

from unclip_jax import pictures
from unclip_jax.paths import write_bytes

PREVIEWS = 10  # of each model and batch, at most
PREVIEW = "preview.png"  # below the folder that is drawn to


class Watch:
    """Tells a model how many steps to take at a time, and sees what it predicts in between. This one sees nothing."""

    sees: ClassVar[bool] = False

    def at_once(self, steps: int) -> int:
        """Number of steps to take at a time, of so many; 0: all, by the program that draws unseen."""
        return 0

    def stage(self, name: str) -> contextlib.AbstractContextManager:
        """Returns the context for a model to run in. name: its folder's in a cascade."""
        return contextlib.nullcontext()

    def step(self, number: int) -> contextlib.AbstractContextManager:
        """Returns the context for the model to take steps in, from step `number` on, and to wait for them in."""
        return contextlib.nullcontext()

    def see(self, x0: np.ndarray) -> None:
        """Takes the pictures that a model predicts by now, (B, H, W, 3) in [-1, 1], if it `sees`."""


class Preview(Watch):
    """Shows the predicted pictures of a batch in a file, until they are drawn. As a context it takes the file away."""

    sees = True

    def __init__(self, out: Path):
        self._path = out / PREVIEW

    def at_once(self, steps: int) -> int:
        return -(-steps // PREVIEWS)

    def see(self, x0: np.ndarray) -> None:
        write_bytes(self._path, pictures.png(pictures.grid(pictures.to_uint8(x0))))

    def __enter__(self) -> "Preview":
        return self

    def __exit__(self, *error: object) -> None:
        self._path.unlink(missing_ok=True)


class Profile(Watch):
    """Names models and steps in the trace of a profiler. A step is a call of its own then."""

    def at_once(self, steps: int) -> int:
        return 1

    def stage(self, name: str) -> contextlib.AbstractContextManager:
        self._name = name
        return jax.profiler.TraceAnnotation(name)

    def step(self, number: int) -> contextlib.AbstractContextManager:
        return jax.profiler.StepTraceAnnotation(f"{self._name} step", step_num=number)
