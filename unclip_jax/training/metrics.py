"""Logs a run: WORKDIR/metrics.jsonl, TensorBoard events, and a line on the screen."""

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import jax
import numpy as np

from unclip_jax.errors import UserError
from unclip_jax.paths import is_remote, to_path, write_bytes

SECONDS_BETWEEN_LINES = 10.0  # on a screen that is no terminal
SECONDS_BETWEEN_UPLOADS = 60.0  # an object store cannot append: each upload writes the whole file again


class MetricLogger:
    """Writes the metrics of a run; every process makes one, only process 0 writes.

    workdir: a folder on a disk, or gs://... (TensorBoard events then need the package google-cloud-storage).
    total_steps, start_step: steps are counted as done, so a resumed run continues at start_step + 1. What an earlier
    run logged beyond start_step is dropped, so that no step is there twice.
    batch_size: images (or pairs) of one global batch. label: the name of what is trained, for the screen.

    The clock of `images_per_second` starts when the logger is made and stands still inside `pause`: put compilation,
    checkpoints and sampling in there.
    """

    def __init__(self, workdir: str, total_steps: int, batch_size: int, start_step: int, label: str):
        self._total, self._batch_size, self._label = total_steps, batch_size, label
        self._step = self._start_step = start_step
        self._began = self._running_since = time.monotonic()  # running_since is None while paused
        self._worked = self._worked_at_log = 0.0
        self._writes = jax.process_index() == 0
        _check_tensorboard(workdir)  # on every process: one that fails alone leaves the others waiting
        if self._writes:
            self._lines = _Lines(workdir, start_step)
            self._began -= self._lines.seconds
            self._board = _tensorboard(workdir, start_step)
            self._screen = _Screen(total_steps, start_step, label)

    def log(self, step: int, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Writes scalars of `step`, the number of steps done, and gives them; fetching them waits for the device.

        metrics: of a train step, as `scalars` reads them. Adds `images_per_second`, over the steps since the last log,
        and `seconds`, the wall time of the run with its pauses and with the runs it resumes. A value that is not finite
        is null in metrics.jsonl, as JSON has no NaN.
        """
        values = scalars(metrics)
        now = time.monotonic()
        worked = self._worked + (0.0 if self._running_since is None else now - self._running_since)
        rate = (step - self._step) * self._batch_size / max(worked - self._worked_at_log, 1e-9)
        self._step, self._worked_at_log = step, worked
        if not self._writes:
            return values
        # Rounded to what is measured; `loss` comes first for whoever reads the file by eye.
        clock = {"images_per_second": round(rate, 3), "seconds": round(now - self._began, 3)}
        first = {name: values.pop(name) for name in ("loss",) if name in values}
        values = first | clock | values
        self._lines.append({"step": step} | values)
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        done = step - self._start_step
        left = (self._total - step) * worked / done if done else math.inf
        self._screen.show(step, values.get("loss", math.nan), rate, left)
        return values

    @contextlib.contextmanager
    def pause(self, *pending: Any) -> Iterator[None]:
        """Stops the clock of `images_per_second`; first waits for the arrays in `pending`, whose work should count."""
        jax.block_until_ready(pending)
        if self._running_since is None:  # inside another pause, which goes on after this one
            yield
            return
        self._worked += time.monotonic() - self._running_since
        self._running_since = None
        if self._writes:
            self._lines.upload()
        try:
            yield
        finally:
            self._running_since = time.monotonic()

    def close(self) -> None:
        """Writes out what is still held back."""
        if self._writes:
            self._lines.upload()
            self._board.close()
            self._screen.close()

    def __enter__(self) -> "MetricLogger":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers that a train step's metrics stand for; fetching them waits for the device.

    A pair is a mean over some rows alone, (sum, number): where there were no such rows it has no value and is left
    out, so that a NaN always means a computation gone wrong.
    """
    values = {}
    for name, value in jax.device_get(dict(metrics)).items():
        total, count = value if isinstance(value, tuple) else (value, 1)
        if count:
            values[name] = float(total / count)
    return values


class ExpectedLoss:
    """Says so when the loss leaves the band that runs of a config showed, and when it is back.

    bands: (step, low, high) rows in the order of steps; between two of them the band goes straight from one to the
    other, and before the first and after the last there is none.
    """

    def __init__(self, bands: tuple[tuple[int, float, float], ...]):
        self._bands, self._outside = bands, False

    def look(self, step: int, loss: float) -> None:
        """Compares the loss of a step."""
        if jax.process_index() != 0 or not self._bands or not self._bands[0][0] <= step <= self._bands[-1][0]:
            return
        steps, lows, highs = zip(*self._bands, strict=True)
        low, high = np.interp(step, steps, lows), np.interp(step, steps, highs)
        outside = not low <= loss <= high
        if outside != self._outside:
            line = f"step {step}: the loss is {loss:.4g}, where runs of this config had {low:.4g} to {high:.4g}"
            print(f"warning: {line}" if outside else f"{line} again", file=sys.stderr, flush=True)
        self._outside = outside


class _Lines:
    """metrics.jsonl: appended line by line on a disk, kept in memory and uploaded now and then on an object store."""

    def __init__(self, workdir: str, start_step: int):
        self._path = to_path(workdir) / "metrics.jsonl"
        kept = self._read(start_step)
        self.seconds = float(kept[-1]["seconds"]) if kept else 0.0  # of the runs before this one
        self._text = "".join(json_line(record) for record in kept)
        self._remote, self._uploaded_at = is_remote(workdir), time.monotonic()
        write_bytes(self._path, self._text.encode(), alone=True)

    def _read(self, start_step: int) -> list[dict]:
        if not self._path.exists():
            return []
        lines = self._path.read_text().splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            lines.pop()  # the earlier run was killed while writing it
        try:
            records = [json.loads(line) for line in lines]
            return [record for record in records if record["step"] <= start_step and record["seconds"] >= 0]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self._path} is not a log of metrics, one JSON object a line: move it away") from error

    def append(self, record: dict) -> None:
        if not self._remote:
            with open(self._path, "a") as file:
                file.write(json_line(record))
            return
        self._text += json_line(record)
        if time.monotonic() - self._uploaded_at > SECONDS_BETWEEN_UPLOADS:
            self.upload()

    def upload(self) -> None:
        if self._remote:
            write_bytes(self._path, self._text.encode(), alone=True)
            self._uploaded_at = time.monotonic()


class _Screen:
    """A progress bar on a terminal, else one plain line now and then; on stderr, so that stdout stays for results."""

    def __init__(self, total_steps: int, start_step: int, label: str):
        self._total, self._label, self._bar = total_steps, label, None
        self._shown_at = -math.inf
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total_steps, initial=start_step, desc=label, unit="step", dynamic_ncols=True)

    def show(self, step: int, loss: float, images_per_second: float, seconds_left: float) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4g}, {images_per_second:.4g} images/s", refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        if now - self._shown_at < SECONDS_BETWEEN_LINES and step < self._total:
            return
        self._shown_at = now
        left = timedelta(seconds=round(seconds_left)) if math.isfinite(seconds_left) else "unknown"
        print(
            f"{self._label}: step {step}/{self._total}, loss {loss:.4g}, {images_per_second:.4g} images/s, left {left}",
            file=sys.stderr,
            flush=True,
        )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def json_line(record: dict) -> str:
    """One line of JSON, in which a number that is not finite is null."""
    return json.dumps({k: v if v is not None and math.isfinite(v) else None for k, v in record.items()}) + "\n"


def _check_tensorboard(workdir: str) -> None:
    from tensorboardX import record_writer

    if is_remote(workdir) and not record_writer.GCS_ENABLED:
        raise UserError(f"TensorBoard events in {workdir} need one more package: pip install google-cloud-storage")


def _tensorboard(workdir: str, start_step: int) -> Any:
    from tensorboardX import SummaryWriter

    # purge_step hides what an earlier run wrote beyond the step this one starts from.
    return SummaryWriter(str(to_path(workdir) / "tensorboard"), purge_step=start_step + 1)
