"""Examines and writes a range of the records of sources: the work of one worker of `data build`.

Which records a range has follows from the sources alone. What is done of it is in files that appear as a whole: whoever
finds them there does not do it again.
"""

import contextlib
import functools
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from unclip_jax.data import duplicates
from unclip_jax.data.cleaning import UNREADABLE, Candidate, Limits, smaller
from unclip_jax.data.sources import Source, open_source
from unclip_jax.data.splits import draws_of_names
from unclip_jax.data.transforms import captions_of, decode
from unclip_jax.errors import UnreadableRecord, UserError
from unclip_jax.paths import copy_files, is_remote, to_path, write_bytes

MOST_RECORDS, FEWEST_RECORDS, RANGES = 8192, 64, 100  # of a range; ranges, unless these say otherwise
THREADS = 8  # that read and decode, in each worker
AT_ONCE = 128  # records that a worker holds, and that a network sees at once
NAMED = 100  # records that could not be read, of which build.json says why


class Scorer(Protocol):
    """Steps that a network decides, on whatever the views are that it makes of a picture."""

    def load(self) -> None: ...

    def views(self, picture: np.ndarray) -> Any: ...

    def apply(self, candidates: list[Candidate]) -> None: ...


@dataclass(frozen=True)
class Job:
    """Sources, settings and folder of a build, as workers are sent them.

    sources: (spec, split, number of records) of each. folder: of the dataset. shorter_side: of pictures that are made
    smaller; 0 leaves them as they are. held_out: share of the records that make the test split. exact, bits: as in
    `duplicates.find`.
    """

    sources: tuple[tuple[str, str, int], ...]
    data_dir: str
    image_feature: str
    caption_feature: str
    folder: str
    limits: Limits
    scorer: Scorer | None
    exact: bool
    bits: int | None
    shorter_side: int
    held_out: float

    @property
    def records(self) -> int:
        return sum(count for *_, count in self.sources)

    @property
    def range_size(self) -> int:
        """Records of a range. It follows from their number alone, so that shards are the same for any workers."""
        return min(MOST_RECORDS, max(FEWEST_RECORDS, -(-self.records // RANGES)))

    @property
    def ranges(self) -> int:
        return -(-self.records // self.range_size)

    @property
    def finds_duplicates(self) -> bool:
        return self.exact or self.bits is not None

    def rows(self, number: int) -> range:
        """Numbers of the records of a range."""
        return range(number * self.range_size, min((number + 1) * self.range_size, self.records))

    def part(self, name: str, number: int) -> Path:
        """File that says what is known of a range: "examined" or "done"."""
        return to_path(self.folder) / "parts" / f"{name}-{number:05}.json"

    def open(self) -> None:
        """Opens the sources in this process, before threads read from them. Raises UserError where one has changed."""
        for source in self.sources:
            self._opened(source)

    def read(self, index: int) -> dict:
        """Reads a record of all sources. Raises UnreadableRecord where that fails."""
        for source in self.sources:
            if index < source[-1]:
                return self._opened(source)[index]
            index -= source[-1]
        raise IndexError(index)

    def _opened(self, source: tuple[str, str, int]) -> Source:
        return _opened(source, self.data_dir, self.image_feature, self.caption_feature)


@functools.cache
def _opened(source: tuple[str, str, int], *features: str) -> Source:
    """Opens a source once in each worker. Raises UserError where it has other records than when the build began."""
    spec, split, count = source
    opened = open_source(spec, split, *features)
    if len(opened) != count:
        raise UserError(f"{spec} had {count} records of {split}, now {len(opened)}: build anew, and change nothing")
    return opened


def examine(number: int, job: Job) -> int:
    """Writes what the steps decide about the records of a range to a file, unless it is there; returns the number."""
    place = job.part("examined", number)
    if not place.exists():
        kept, summary = [], _Summary(number)
        for candidate in _examined(job, number):
            if candidate.dropped:
                summary.drop(candidate)
            else:
                kept.append((candidate.row, candidate.chosen, candidate.digest, candidate.look))
        write_bytes(place, json.dumps({"kept": kept, "summary": summary.found}).encode())
    return number


def write(number: int, job: Job, found: dict[int, str] | None = None) -> dict[str, Any]:
    """Writes the shards of a range, unless that is done; returns its summary.

    found: duplicates, index → step, of a range that was examined before; None examines it now.
    """
    place = job.part("done", number)
    if place.exists():
        return json.loads(place.read_text())
    if found is None:
        summary, candidates = _Summary(number), _examined(job, number)
    else:
        examined = json.loads(job.part("examined", number).read_text())
        summary, candidates = _Summary(number, examined["summary"]), _again(job, examined["kept"], found)
    with contextlib.ExitStack() as shards:
        writers: dict[str, Callable] = {}
        for candidate in candidates:
            if candidate.dropped:
                summary.drop(candidate)
                continue
            split = "test" if place_of(candidate.key) < job.held_out else "train"
            if split not in writers:
                writers[split] = shards.enter_context(_shard(job, split, number))
            captions = [candidate.captions[k] for k in candidate.chosen]
            key = os.fsencode(candidate.key).decode(errors="replace")  # a file's name need not be UTF-8
            example = {"image": candidate.image, "caption": captions, "key": key}
            content = features().serialize_example(example)
            writers[split](content)
            summary.keep(split, len(content))
    write_bytes(place, json.dumps(summary.found).encode())  # after the shards: what is done is there
    return summary.found


def place_of(key: str) -> float:
    """Draws a number in [0, 1) by a record's key without its ending, as folders do for what they hold out."""
    return int(draws_of_names([key])[0]) / 2**64


@functools.cache
def features() -> Any:
    """Features of the datasets that are built."""
    import tensorflow_datasets as tfds

    text = tfds.features.Text()
    return tfds.features.FeaturesDict(
        {"image": tfds.features.Image(), "caption": tfds.features.Sequence(text), "key": text}
    )


def _examined(job: Job, number: int) -> Iterator[Candidate]:
    """Yields the records of a range in order, as the steps leave them."""
    job.open()
    if job.scorer:
        job.scorer.load()
    with ThreadPoolExecutor(THREADS) as pool:
        rows = iter(job.rows(number))
        while part := list(itertools.islice(rows, AT_ONCE)):
            candidates = list(pool.map(functools.partial(_candidate, job), part))
            if job.scorer and (left := [candidate for candidate in candidates if not candidate.dropped]):
                job.scorer.apply(left)
            yield from candidates


def _candidate(job: Job, row: int) -> Candidate:
    """Reads a record, and takes the steps that need no network."""
    found = _read(job, row)
    picture, found.views = found.views, None
    if found.dropped:
        return found
    job.limits.apply(found, picture)
    if not found.dropped:
        if job.scorer:
            found.views = job.scorer.views(picture)
        if job.finds_duplicates:
            found.digest, found.look = duplicates.digest(picture), duplicates.look(picture)
            found.image = b""  # it is read again
        elif job.shorter_side:
            found.image = smaller(found.image, picture, job.shorter_side)
    return found


def _read(job: Job, row: int) -> Candidate:
    """Reads and decodes a record; its picture is in `views`."""
    found = Candidate(row, f"record {row}")
    try:
        record = job.read(row)
        found.key, found.image, found.captions = record["key"], record["image"], captions_of(record)
        found.views, found.chosen = decode(found.image), list(range(len(found.captions)))
        if not found.captions:
            raise UnreadableRecord("it has no caption")
    except UnreadableRecord as error:
        found.dropped, found.why = UNREADABLE, str(error)
    return found


def _again(job: Job, kept: list, found: dict[int, str]) -> Iterator[Candidate]:
    """Yields those records of an examined range that were kept; those among them that are duplicates as dropped."""

    def read(row: int, chosen: list[int]) -> Candidate:
        candidate = _read(job, row)
        if not candidate.dropped and job.shorter_side:
            candidate.image = smaller(candidate.image, candidate.views, job.shorter_side)
        candidate.chosen, candidate.views = chosen, None
        return candidate

    job.open()
    with ThreadPoolExecutor(THREADS) as pool:
        rest = iter(kept)
        while part := list(itertools.islice(rest, AT_ONCE)):
            yield from (Candidate(row, "", dropped=found[row]) for row, *_ in part if row in found)
            yield from pool.map(lambda record: read(*record[:2]), [record for record in part if record[0] not in found])


class _Summary:
    """Counts of a range's records, with their bytes, and names of those that cannot be read."""

    def __init__(self, number: int, found: dict[str, Any] | None = None):
        self._number = str(number)
        self.found = found or {"dropped": {}, "unreadable": [], "shards": {}, "bytes": {}}

    def drop(self, candidate: Candidate) -> None:
        self._add("dropped", candidate.dropped, 1)
        if candidate.dropped == UNREADABLE and len(self.found["unreadable"]) < NAMED:
            self.found["unreadable"].append((candidate.row, candidate.key, candidate.why))

    def keep(self, split: str, size: int) -> None:
        shards = self.found["shards"].setdefault(split, {})
        shards[self._number] = shards.get(self._number, 0) + 1
        self._add("bytes", split, size)

    def _add(self, name: str, key: str, count: int) -> None:
        self.found[name][key] = self.found[name].get(key, 0) + count


@contextlib.contextmanager
def _shard(job: Job, split: str, number: int) -> Iterator[Callable[[bytes], None]]:
    """Yields a function that adds a record to a shard, which appears as a whole. Only local files can be written."""
    from array_record.python.array_record_module import ArrayRecordWriter

    final = _shard_path(job, split, number)
    parts = None if is_remote(final) else to_path(job.folder) / "parts"
    if parts:
        parts.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parts) as folder:
        written = to_path(folder) / final.name
        writer = ArrayRecordWriter(str(written), "group_size:1")  # as TFDS does: any record can be read by itself
        yield writer.write
        writer.close()
        if parts:
            os.replace(written, final)
        else:
            copy_files([(written, final)], f"copying {final.name}")


def _shard_path(job: Job, split: str, number: int) -> Path:
    folder = to_path(job.folder)
    return folder / f"{folder.parent.name}-{split}.array_record-{number:05}-of-{job.ranges:05}"
