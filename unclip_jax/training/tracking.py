"""Watches a run from outside: traces some of its steps, and sends its metrics to Weights & Biases."""

import contextlib
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from unclip_jax.errors import UserError
from unclip_jax.paths import is_remote, to_path, write_bytes

BEFORE = 10  # steps that are not traced: the first ones compile, and fill caches
TRACE, RUN_ID = "profile", "wandb_id.txt"  # below WORKDIR
STEP = "train step"  # name of steps in a trace


class Profiler:
    """Traces `count` steps of a run that starts at step `start` + 1, on every process, for xprof or TensorBoard.

    workdir: the trace is written below it, into profile/. count: 0 traces nothing. A run that ends before has none.
    """

    def __init__(self, workdir: str, start: int, count: int):
        self._workdir, self._first, self._last = workdir, start + BEFORE + 1, start + BEFORE + count
        self._trace = contextlib.ExitStack()
        self._tracing = False

    def step(self, step: int, pending: Any) -> contextlib.AbstractContextManager:
        """Begins or ends the trace, as is due before `step`, and returns the context to take the step in.

        pending: results of the step before it.
        """
        if step == self._first <= self._last:
            jax.block_until_ready(pending)
            self._trace.enter_context(traced(to_path(self._workdir) / TRACE))
            self._tracing = True
        elif self._tracing and step > self._last:
            self.close(pending)
        known = jax.profiler.StepTraceAnnotation(STEP, step_num=step)  # by which xprof tells steps apart
        return known if self._tracing else contextlib.nullcontext()

    def close(self, pending: Any = None) -> None:
        """Ends the trace, if one is being made, and writes it."""
        if self._tracing:
            jax.block_until_ready(pending)
            self._trace.close()
            self._tracing = False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@contextlib.contextmanager
def traced(folder: Path) -> Iterator[None]:
    """Traces what runs inside into a folder, on a disk or in a bucket, for xprof or TensorBoard."""
    aside = is_remote(folder) or not str(folder).isprintable()  # the profiler takes names in UTF-8 alone
    local = to_path(tempfile.mkdtemp()) if aside else folder
    try:
        with jax.profiler.trace(str(local)):
            yield
        for path in local.rglob("*") if aside else ():
            if path.is_file():
                write_bytes(folder / path.relative_to(local), path.read_bytes())
    finally:
        if aside:
            shutil.rmtree(local)


@contextlib.contextmanager
def tracked(project: str, workdir: str, config: ConfigDict) -> Iterator[None]:
    """Sends what TensorBoard is given to a project of Weights & Biases too; "" to none. Process 0 does it for all.

    A resumed run goes on under its first id, which WORKDIR keeps. Who logs in, and where runs are kept, is said by
    wandb's own environment variables, such as WANDB_API_KEY and WANDB_MODE; nothing of them is stored.
    """
    if not project or jax.process_index() != 0:
        yield
        return
    import wandb

    place = to_path(workdir) / RUN_ID
    if not place.exists():
        write_bytes(place, uuid.uuid4().hex[:12].encode())
    known = {"id": place.read_text().strip(), "name": to_path(workdir).name, "resume": "allow"}
    try:
        run = wandb.init(project=project, config=config.to_dict(), sync_tensorboard=True, **known)
    except wandb.Error as error:
        raise UserError(f"--wandb {project}: {error}") from error
    failed = True
    try:
        yield
        failed = False
    finally:
        run.finish(exit_code=int(failed))
