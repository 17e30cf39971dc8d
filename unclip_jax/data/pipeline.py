"""Makes batches of a dataset: this process's rows of global batch k, which depend on (seed, k) alone.

Grain reads and shuffles. No state of an iterator is ever stored: its position follows from the number of the step. Each
epoch is shuffled anew, and one follows the other without a gap, so that every example is seen once in an epoch whatever
the batch size.
"""

import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from absl import logging

from unclip_jax.data import mixture
from unclip_jax.data.sources import Source, without_picture
from unclip_jax.errors import UnreadableRecord, UserError

Transform = Callable[[dict, np.random.Generator], dict[str, np.ndarray]]  # (record, rng) → arrays of an example
MAX_NAMED = 100  # unreadable records named in the log, each once; all are counted
MAX_TRIES = 1000  # records tried in place of an unreadable one


def batches(
    source: Source,
    transform: Transform,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    rows: Sequence[int] | np.ndarray | None = None,
    threads: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields batches without end, from batch number `start_step` on; the first one is number 0.

    A batch is a dict of stacked arrays: those of the transform, and "records_skipped", int32 (rows,), how many
    unreadable records were skipped for each row.

    transform: makes one example from a record and a random generator, which is seeded by (seed, example).
    batch_size: rows of all processes together. Row r of batch k is example k · batch_size + r of the shuffled epochs.
    rows: which of them to yield, in this order, such as `training.sharding.own_rows`; None: all.
    threads: that read and transform.

    An unreadable record is replaced by another, drawn by the seed, and named in the log. Raises UserError where nothing
    can be read.
    """
    import grain

    own = np.arange(batch_size) if rows is None else np.asarray(rows)
    readable = _Readable(source, transform, seed)
    readable.check()
    order = mixture.order(source, seed)

    def example(k: int) -> dict[str, np.ndarray]:
        step, row = divmod(k, len(own))
        position = step * batch_size + int(own[row])
        found, skipped = readable.example(order[position], position)
        return found | {"records_skipped": np.int32(skipped)}

    mine = grain.MapDataset.range(start_step * len(own), _FAR).map(example).batch(len(own))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads)
    return iter(mine.to_iter_dataset(options))


def evaluation_batch(source: Source, transform: Transform, n: int, seed: int) -> dict[str, np.ndarray]:
    """Stacks the examples of n records, drawn by the seed, or of all if there are fewer: in order, always the same."""
    readable = _Readable(source, transform, seed)
    examples = [readable.example(k, k)[0] for k in mixture.sample(source, n, seed)]
    return {name: np.stack([e[name] for e in examples]) for name in examples[0]}


def captions(source: Source, count: int, threads: int) -> Iterator[str | list[str]]:
    """Yields the captions of `count` records, spread evenly over all, in order, without those that cannot be read."""
    import grain

    skipped = Skipped()

    def caption(k: int) -> str | list[str] | None:
        index = k * len(source) // count
        try:
            return without_picture(source, index)["caption"]
        except UnreadableRecord as error:
            skipped.note(f"number {index}", error)
            return None

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads)
    return iter(grain.MapDataset.range(count).map(caption).to_iter_dataset(options))


_FAR = 2**52  # examples, more than any run will see


class Skipped:
    """Names unreadable records in the log: each once, and the first MAX_NAMED alone. For any number of threads."""

    def __init__(self) -> None:
        self._lock, self._named = threading.Lock(), set[str]()

    def note(self, key: str, error: UnreadableRecord) -> None:
        """Names a record, and says why it cannot be read."""
        with self._lock:
            if key in self._named or len(self._named) == MAX_NAMED:
                return
            self._named.add(key)
        logging.warning("skipped unreadable record %s: %s", key, error)


class _Readable:
    """Transforms records, and skips those that cannot be read."""

    def __init__(self, source: Source, transform: Transform, seed: int):
        self._source, self._transform, self._seed = source, transform, seed
        self._skipped = Skipped()

    def check(self) -> None:
        """Raises UserError where nothing can be read, to be called before anything long starts."""
        self.example(0, 0)

    def example(self, index: int, position: int) -> tuple[dict[str, np.ndarray], int]:
        """Makes the example of record `index`, or else of another record, drawn by the seed: neighbours may have been
        damaged together.

        position: of the example among all epochs, which seeds its randomness. Returns the example, and how many records
        were skipped. Raises UserError where none of MAX_TRIES records can be read.
        """
        others, last = np.random.default_rng((self._seed, position, 1)), ""
        for skipped in range(MAX_TRIES):
            key = f"number {index}"
            try:
                record = self._source[index]
                key = record["key"]
                return self._transform(record, np.random.default_rng((self._seed, position))), skipped
            except UnreadableRecord as error:
                last = f"{key}: {error}"
                self._skipped.note(key, error)
            index = int(others.integers(len(self._source)))
        raise UserError(f"none of {MAX_TRIES} records could be read: is this a dataset of pictures? The last: {last}")
