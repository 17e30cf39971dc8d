"""Makes batches of a dataset: this process's rows of global batch k, which depend on (seed, k) alone.

Grain shuffles. No state of an iterator is ever stored: its position follows from the number of the step. Each epoch is
shuffled anew, and one follows the other without a gap, so that every example is seen once in an epoch whatever the
batch size. Batches are made in parts, by all threads and workers at once, so that what waits is bounded in bytes.
"""

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from absl import logging

from unclip_jax.data import mixture
from unclip_jax.data.sources import Source, without_picture
from unclip_jax.data.workers import in_order
from unclip_jax.errors import UnreadableRecord, UserError, one_line

Example = dict[str, np.ndarray]
Transform = Callable[[dict, np.random.Generator], Example]  # (record, rng) → arrays of an example
MAX_NAMED = 100  # unreadable records named in the log, each once; all are counted
MANY, ENOUGH = 0.1, 100  # share of unreadable records that is said aloud, of as many records at least
MAX_TRIES = 1000  # records tried in place of an unreadable one
BATCHES_AHEAD = 4  # for each thread, unless they are larger than this:
BYTES_AHEAD = 2**30  # of examples that wait or are being made, in all workers together
PART_BYTES = 2**20  # of examples that one thread makes in a row


def batches(
    source: Source,
    transform: Transform,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    rows: Sequence[int] | np.ndarray | None = None,
    threads: int = 1,
    workers: int = 0,
) -> Iterator[Example]:
    """Yields batches without end, from batch number `start_step` on; the first one is number 0.

    A batch is a dict of stacked arrays: those of the transform, and "records_skipped", int32 (rows,), how many
    unreadable records were skipped for each row.

    transform: makes one example from a record and a random generator, which is seeded by (seed, example).
    batch_size: rows of all processes together. Row r of batch k is example k · batch_size + r of the shuffled epochs.
    rows: which of them to yield, in this order, such as `training.sharding.own_rows`; None: all.
    threads: that read and transform. workers: processes that share the threads and get `source` and `transform`
    pickled; 0: this process has the threads.

    An unreadable record is replaced by another, drawn by the seed, and named in the log. Raises UserError where nothing
    can be read, and for workers that cannot be started.
    """
    own = np.arange(batch_size) if rows is None else np.asarray(rows)
    readable = _Readable(source, transform, seed)
    bytes_each = max(1, sum(array.nbytes for array in readable.check().values()))
    order = mixture.order(source, seed)

    # Parts small enough that all threads make a batch together, and that a part more or less is little memory.
    busy = max(threads, workers)
    size = max(1, min(PART_BYTES // bytes_each, len(own) // busy))
    waiting = min(BATCHES_AHEAD * busy * len(own), BYTES_AHEAD // bytes_each)

    def parts() -> Iterator[list[tuple[int, int]]]:
        for step in itertools.count(start_step):
            for first in range(0, len(own), size):
                positions = (step * batch_size + int(row) for row in own[first : first + size])
                yield [(int(order[position]), position) for position in positions]

    made = in_order(readable.examples, parts(), max(busy, waiting // size), threads, workers)
    return _stacked(made, len(own), Skipped())


def _stacked(parts: "Iterator[_Examples]", rows: int, named: "Skipped") -> Iterator[Example]:
    """Yields batches of so many rows, made of parts that do not reach beyond a batch. named: notes what was skipped."""
    with contextlib.closing(parts):  # ends the workers too
        while True:
            batch, filled = dict[str, np.ndarray](), 0
            while filled < rows:
                part, skipped = next(parts)
                for record in skipped:
                    named.note(*record)
                named.count(len(part["records_skipped"]), len(skipped))
                here = slice(filled, filled + len(part["records_skipped"]))
                for name, array in part.items():
                    if name not in batch:
                        batch[name] = np.empty((rows, *array.shape[1:]), array.dtype)
                    batch[name][here] = array
                filled = here.stop
            yield batch


def evaluation_batch(source: Source, transform: Transform, n: int, seed: int) -> dict[str, np.ndarray]:
    """Stacks the examples of n records, drawn by the seed, or of all if there are fewer: in order, always the same."""
    readable = _Readable(source, transform, seed)
    examples, skipped, named = [], [], Skipped()
    for k in mixture.sample(source, n, seed):
        examples.append(readable.example(k, k, skipped))
    for record in skipped:
        named.note(*record)
    named.count(len(examples), len(skipped))
    return {name: np.stack([e[name] for e in examples]) for name in examples[0]}


def captions(source: Source, count: int, threads: int) -> Iterator[str | list[str]]:
    """Yields the captions of `count` records, spread evenly over all, in order, without those that cannot be read."""
    import grain

    skipped = Skipped()

    def caption(k: int) -> str | list[str] | None:
        index = k * len(source) // count
        try:
            found = without_picture(source, index)["caption"]
            skipped.count(1, 0)
            return found
        except UnreadableRecord as error:
            skipped.note(f"number {index}", error)
            skipped.count(0, 1)
            return None

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads)
    return iter(grain.MapDataset.range(count).map(caption).to_iter_dataset(options))


class Skipped:
    """Names unreadable records in the log: each once, and the first MAX_NAMED alone; says it, once, where they are more
    than MANY of all. For any number of threads."""

    def __init__(self) -> None:
        self._lock, self._named = threading.Lock(), set[str]()
        self._tried = self._lost = 0
        self._said = False

    def count(self, read: int, lost: int) -> None:
        """Counts records that were read, and others that could not be."""
        with self._lock:
            self._tried, self._lost = self._tried + read + lost, self._lost + lost
            say = not self._said and self._tried >= ENOUGH and self._lost > MANY * self._tried
            self._said = self._said or say
        if say:
            text = "%d of the first %d records cannot be read, more than a tenth: see above why, is the dataset whole?"
            logging.error(text, self._lost, self._tried)

    def note(self, key: str, why: UnreadableRecord | str) -> None:
        """Names a record, and says why it cannot be read."""
        with self._lock:
            if key in self._named or len(self._named) == MAX_NAMED:
                return
            self._named.add(key)
        logging.warning("skipped unreadable record %s: %s", one_line(key), why)


_Examples = tuple[Example, list[tuple[str, str]]]  # stacked, and the records that were skipped: (key, why) of each


class _Readable:
    """Transforms records, and skips those that cannot be read. Can be pickled if source and transform can."""

    def __init__(self, source: Source, transform: Transform, seed: int):
        self._source, self._transform, self._seed = source, transform, seed

    def check(self) -> Example:
        """Makes an example, to be called before anything long starts. Raises UserError where nothing can be read."""
        return self.example(0, 0, [])

    def examples(self, wanted: list[tuple[int, int]]) -> _Examples:
        """Makes the examples of (index, position), as `example` says."""
        skipped, found, counts = list[tuple[str, str]](), [], []
        for index, position in wanted:
            before = len(skipped)
            found.append(self.example(index, position, skipped))
            counts.append(len(skipped) - before)
        stacked = {name: np.stack([example[name] for example in found]) for name in found[0]}
        return stacked | {"records_skipped": np.array(counts, np.int32)}, skipped

    def example(self, index: int, position: int, skipped: list[tuple[str, str]]) -> Example:
        """Makes the example of record `index`, or else of another record, drawn by the seed: neighbours may have been
        damaged together.

        position: of the example among all epochs, which seeds its randomness. skipped: is given the records that were
        skipped, (key, why) of each. Raises UserError where none of MAX_TRIES records can be read.
        """
        others = np.random.default_rng((self._seed, position, 1))
        for _ in range(MAX_TRIES):
            key = f"number {index}"
            try:
                record = self._source[index]
                key = record["key"]
                return self._transform(record, np.random.default_rng((self._seed, position)))
            except UnreadableRecord as error:
                skipped.append((key, str(error)))
            index = int(others.integers(len(self._source)))
        last = ": ".join(skipped[-1])
        raise UserError(f"none of {MAX_TRIES} records could be read: is this a dataset of pictures? The last: {last}")
