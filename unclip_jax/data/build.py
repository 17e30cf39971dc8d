"""Builds a TFDS dataset out of sources by Apache Beam, which is what `data build` does: on one machine, or on many.

    DIR/NAME/1.0.0/build.json               settings, and counts of what was kept and dropped
    DIR/NAME/1.0.0/NAME-train.array_record-00000-of-00100    kept records of a range of the sources' records
    DIR/NAME/1.0.0/parts/                   while it is built: what is done; deleted at the end
    DIR/NAME/1.0.0/dataset_info.json        written last: without it there is no dataset

The sources' records are cut into ranges, so that each fits a shard. A worker takes a range, examines its records and
writes those that are kept. So no picture travels between workers, a worker holds a few pictures at a time, and the
shards depend on nothing but sources and settings. A range that is done has a file in parts/: it is not done again.

Where duplicates are left out, ranges are examined first, and their records' hashes compared. Records that are kept are
then read once more.
"""

import json
import shlex
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from unclip_jax.data import duplicates
from unclip_jax.data.build_ranges import NAMED, Job, examine, features, write
from unclip_jax.errors import UserError
from unclip_jax.paths import is_remote, to_path, write_bytes

if TYPE_CHECKING:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner

VERSION = "1.0.0"
SPLITS = ("train", "test")
SECONDS_BETWEEN_LINES, SECONDS_BETWEEN_LISTS = 10.0, 60.0  # of progress; in a bucket, where a list takes requests
# Program of a worker on this machine. Beam's own says on stderr what only Beam's authors need.
WORKER = "import logging; logging.disable(logging.WARNING); from apache_beam.runners.worker import sdk_worker_main; "
WORKER += "sdk_worker_main.main([])"


def on_this_machine(workers: int) -> "tuple[PipelineOptions, FnApiRunner]":
    """Makes the options and the runner of so many processes; one is this process itself.

    The runner is what Beam's DirectRunner comes to, after it has tried to download another.
    """
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner
    from apache_beam.transforms.environments import SubprocessSDKEnvironment

    command = shlex.join([sys.executable, "-c", WORKER])
    environment = SubprocessSDKEnvironment.from_command_string(command) if workers > 1 else None
    return PipelineOptions([], direct_num_workers=workers), FnApiRunner(environment)


def run(job: Job, options: "PipelineOptions", runner: Any) -> dict[str, Any]:
    """Runs the pipeline, with a line on stderr now and then; returns what `_merged` sums up.

    Raises UserError where workers wrote to a folder of their own.
    """
    import apache_beam as beam

    total = to_path(job.folder) / "parts" / "total"
    with _Progress(job), beam.Pipeline(runner=runner, options=options) as pipeline:
        numbers = pipeline | "ranges" >> beam.Create(range(job.ranges)) | "over workers" >> beam.Reshuffle()
        if job.finds_duplicates:
            done = _without_duplicates(numbers, job)
        else:  # a lambda, since Beam 2.69 cannot check the type of the third argument
            done = numbers | "write" >> beam.Map(lambda number, job: write(number, job), job)
        merged = done | "sum" >> beam.CombineGlobally(_merged)
        _ = merged | "store" >> beam.Map(lambda found, path: write_bytes(path, json.dumps(found).encode()), total)
    if not total.exists():
        raise UserError(f"{job.folder} is another folder for the workers: give --out in a bucket that all reach")
    return json.loads(total.read_text())


def _without_duplicates(numbers: "beam.PCollection", job: Job) -> "beam.PCollection":
    """Examines ranges, finds duplicates in all of them, then writes each."""
    import apache_beam as beam

    examined = numbers | "examine" >> beam.Map(examine, job) | "examined" >> beam.Reshuffle()
    hashes = examined | "hashes" >> beam.FlatMap(_hashes, job)
    found = duplicates.find(hashes, job.exact, job.bits)
    by_range = found | "of ranges" >> beam.Map(lambda pair, size: (pair[0] // size, pair), job.range_size)
    keyed = examined | "alone" >> beam.Map(lambda number: (number, None))
    grouped = {"ranges": keyed, "found": by_range} | "with duplicates" >> beam.CoGroupByKey()
    return grouped | "write" >> beam.Map(lambda pair, job: write(pair[0], job, dict(pair[1]["found"])), job)


def _hashes(number: int, job: Job) -> Iterator[tuple[int, str, str]]:
    """Yields (index, digest, look) of the records of an examined range."""
    for row, _, digest, look in json.loads(job.part("examined", number).read_text())["kept"]:
        yield row, digest, look


def _merged(summaries: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Sums up ranges: dropped, step → count; unreadable, the first NAMED (index, key, why); shards, split → number of a
    range → records; bytes, split → of all its records."""
    dropped, size, unreadable, shards = Counter(), Counter(), [], {}
    for summary in summaries:
        dropped.update(summary["dropped"])
        size.update(summary["bytes"])
        unreadable = sorted([*unreadable, *map(tuple, summary["unreadable"])])[:NAMED]
        for split, lengths in summary["shards"].items():
            shards.setdefault(split, {}).update(lengths)
    return {"dropped": dict(dropped), "unreadable": unreadable, "shards": shards, "bytes": dict(size)}


def describe(job: Job, found: dict[str, Any]) -> None:
    """Makes a dataset of the shards, by the metadata that TFDS reads, and deletes what only the build needs.

    found: what `run` returned. Shards of no records need not exist.
    """
    import tensorflow_datasets as tfds

    folder = to_path(job.folder)
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=folder.parent.name, filetype_suffix="array_record"
    )
    splits = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[found["shards"][split].get(str(number), 0) for number in range(job.ranges)],
            num_bytes=found["bytes"][split],
            filename_template=template,
        )
        for split in SPLITS
        if split in found["shards"]
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=folder, features=features(), split_infos=splits, version=VERSION, check_data=False
    )
    forget(job)


def forget(job: Job) -> None:
    """Deletes what only the build needs."""
    parts = to_path(job.folder) / "parts"
    if parts.exists():
        parts.rmtree() if is_remote(parts) else shutil.rmtree(parts)


class _Progress(threading.Thread):
    """Says on stderr how many ranges are done and how long the rest will take, while it is entered.

    It counts their files, wherever they are made. Where ranges are examined first, that is half of the work.
    """

    def __init__(self, job: Job):
        super().__init__(daemon=True)
        self._parts, self._records = to_path(job.folder) / "parts", job.records
        self._steps = 2 if job.finds_duplicates else 1
        self._total, self._over = self._steps * job.ranges, threading.Event()
        self._seconds = SECONDS_BETWEEN_LISTS if is_remote(self._parts) else SECONDS_BETWEEN_LINES

    def __enter__(self) -> "_Progress":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        before, began = self._count(), time.monotonic()
        if before:
            self._say(f"{before / self._total:.1%} was done before")
        while not self._over.wait(self._seconds):
            done = self._count()
            if done == before:
                continue
            speed = (done - before) / (time.monotonic() - began)
            left = timedelta(seconds=round((self._total - done) / speed))
            rate = speed * self._records / self._total
            self._say(f"{done / self._total:.1%} of {self._records:,} records, {rate:.4g} records/s, left {left}")

    def _count(self) -> int:
        return sum(path.name.endswith(".json") for path in self._parts.iterdir()) if self._parts.exists() else 0

    def _say(self, line: str) -> None:
        print(f"build: {line}", file=sys.stderr, flush=True)
