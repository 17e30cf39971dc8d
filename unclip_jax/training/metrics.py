"""Logs of a run: WORKDIR/metrics.jsonl, TensorBoard events, and a line on the screen."""

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import jax
import numpy as np

from unclip_jax.errors import UserError
from unclip_jax.foreign import parsed_json
from unclip_jax.paths import is_remote, to_path, write_bytes

SECONDS_BETWEEN_LINES = 10.0  # where stderr is not a terminal
SLOW_DATA = 0.5  # share of the time that training waits for data, above which it warns
SECONDS_BETWEEN_UPLOADS = 60.0  # an object store cannot append: each upload writes the whole file again


class MetricLogger:
    """Writes the metrics of a run. Every process makes one; only that of process 0 writes.

    workdir: a folder on a disk, or gs://... (TensorBoard events then need the package google-cloud-storage).
    total_steps, start_step: numbers of steps done, so a resumed run continues at start_step + 1. Records of an earlier
    run beyond start_step are dropped, so that no step is logged twice.
    batch_size: images (or pairs) of one global batch. label: name of the stage, for the screen. utilization: share of
    the peak of all chips' FLOPs that one example a second takes; 0 where it is not known.

    The clock of `images_per_second` starts when the logger is made and stands still inside `pause`, which is for
    compilation, checkpoints and sampling.
    """

    def __init__(
        self, workdir: str, total_steps: int, batch_size: int, start_step: int, label: str, utilization: float = 0.0
    ):
        self._total, self._batch_size, self._label = total_steps, batch_size, label
        self._utilization = utilization
        self._step = self._start_step = start_step
        self._began = time.monotonic()
        self._running_since: float | None = self._began  # None while paused
        self._worked = self._worked_at_log = 0.0
        self._waited, self._warned = 0.0, False
        self._writes = jax.process_index() == 0
        _check_tensorboard(workdir)  # on every process: one that fails alone leaves the others waiting
        if self._writes:
            self._lines = _Lines(workdir, start_step)
            self._began -= self._lines.seconds
            self._board = _tensorboard(workdir, start_step)
            self._screen = _Screen(total_steps, start_step, label)

    def log(self, step: int, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Writes the metrics of `step`, the number of steps done, and returns them as numbers. Waits for the device.

        metrics: of a train step, as `scalars` reads them. Adds `images_per_second`, over the steps since the last log;
        `data_wait`, the share of that time inside `waiting`; `mfu`, the model FLOPs utilization (arXiv 2204.02311,
        appendix B), where it is known; and `seconds`, the wall time of the run with its pauses and with the runs that
        it resumes. A value that is not finite is null in metrics.jsonl: JSON has no NaN.
        """
        values = scalars(metrics)

        # The rate is over the time outside of pauses.
        now = time.monotonic()
        worked = self._worked + (0.0 if self._running_since is None else now - self._running_since)
        span = max(worked - self._worked_at_log, 1e-9)
        rate, data_wait = (step - self._step) * self._batch_size / span, self._waited / span
        self._step, self._worked_at_log, self._waited = step, worked, 0.0
        if not self._writes:
            return values

        # The file: the clock rounded to milliseconds, and `loss` first for whoever reads it by eye.
        clock = {"images_per_second": round(rate, 3), "data_wait": round(data_wait, 4)}
        clock |= {"mfu": round(rate * self._utilization, 4)} if self._utilization else {}
        clock |= {"seconds": round(now - self._began, 3)}
        first = {name: values.pop(name) for name in ("loss",) if name in values}
        values = first | clock | values
        self._lines.append({"step": step} | values)
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

        # The screen, with the time left at this run's own pace.
        done = step - self._start_step
        left = (self._total - step) * worked / done if done else math.inf
        self._screen.show(step, values.get("loss", math.nan), rate, left)
        if data_wait > SLOW_DATA and span > SECONDS_BETWEEN_LINES and not self._warned:
            self._warned = True
            print(f"warning: {self._label} waited for its data {data_wait:.0%} of the time: more data.workers help "
                  "while cores are idle, and smaller pictures do", file=sys.stderr, flush=True)  # fmt: skip
        return values

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts what is inside as waiting for data."""
        began = time.monotonic()
        yield
        self._waited += time.monotonic() - began

    def add_held_out(self, step: int, values: Mapping[str, float], grids: Mapping[str, np.ndarray]) -> None:
        """Shows numbers and pictures, uint8 (H, W, 3), of held-out examples in TensorBoard, as "held_out/NAME"."""
        if self._writes:
            for name, value in values.items():
                self._board.add_scalar(f"held_out/{name}", value, step)
            for name, grid in grids.items():
                self._board.add_image(f"held_out/{name}", grid, step, dataformats="HWC")

    @contextlib.contextmanager
    def pause(self, *pending: Any) -> Iterator[None]:
        """Stops the clock of `images_per_second`, once the arrays in `pending` are computed: their work counts."""
        jax.block_until_ready(pending)
        if self._running_since is None:  # inside another pause, which ends later
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
        """Writes whatever is not yet uploaded, and closes the files."""
        if self._writes:
            self._lines.upload()
            self._board.close()
            self._screen.close()

    def __enter__(self) -> "MetricLogger":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Fetches a train step's metrics as numbers; waits for the device.

    A pair (sum, number) is a mean over some of the rows. Where there were no such rows, the metric is left out, so that
    a NaN always means a computation gone wrong.
    """
    values = {}
    for name, value in jax.device_get(dict(metrics)).items():
        total, count = value if isinstance(value, tuple) else (value, 1)
        if count:
            values[name] = float(total / count)
    return values


class ExpectedLoss:
    """Warns when the loss leaves the band in which earlier runs of the config had it, and says when it is back.

    bands: (step, low, high) in the order of steps, linearly interpolated between two of them. Before the first and
    after the last nothing is checked.
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


def read_log(path: Path) -> list[dict]:
    """Reads a log of one JSON object a line, each with its "step", up to where it was cut or damaged; [] where there is
    no file. Raises UserError where not even its first line can be read."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    records: list[dict] = []
    for number, line in enumerate(lines, 1):
        try:
            record = parsed_json(line.decode())
            if line.endswith(b"\n") and record["step"] >= 0:
                records.append(record)
                continue
        except (ValueError, KeyError, TypeError) as error:
            if number == 1 and not line.startswith(b"{"):
                raise UserError(f"{path} is not a log of metrics, one JSON object a line: move it away") from error
        if number < len(lines):  # else the earlier run was killed while writing it
            print(f"warning: {path} is damaged from line {number} on, which is dropped", file=sys.stderr, flush=True)
        break
    return records


class _Lines:
    """metrics.jsonl: on a disk appended line by line, in an object store kept in memory and uploaded now and then."""

    def __init__(self, workdir: str, start_step: int):
        self._path = to_path(workdir) / "metrics.jsonl"
        kept = self._read(start_step)
        self.seconds = float(kept[-1]["seconds"]) if kept else 0.0  # of the runs before this one
        self._text = "".join(json_line(record) for record in kept)
        self._remote, self._uploaded_at = is_remote(workdir), time.monotonic()
        write_bytes(self._path, self._text.encode(), alone=True)

    def _read(self, start_step: int) -> list[dict]:
        records = read_log(self._path)
        return [record for record in records if record["step"] <= start_step and record.get("seconds", -1) >= 0]

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
        self._total, self._label = total_steps, label
        self._bar: Any = None
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
    """Writes a record as one line of JSON, in which a number that is not finite is null."""
    return json.dumps({k: v if v is not None and math.isfinite(v) else None for k, v in record.items()}) + "\n"


def _check_tensorboard(workdir: str) -> None:
    from tensorboardX import record_writer

    if is_remote(workdir) and not record_writer.GCS_ENABLED:
        raise UserError(f"TensorBoard events in {workdir} need one more package: pip install google-cloud-storage")


def _tensorboard(workdir: str, start_step: int) -> Any:
    from tensorboardX import SummaryWriter

    # purge_step hides events of an earlier run beyond the step from which this one starts.
    return SummaryWriter(str(to_path(workdir) / "tensorboard"), purge_step=start_step + 1)
