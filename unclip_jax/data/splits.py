"""Holds records out of training, chosen by a hash of their names, so that adding others moves none of them."""

import hashlib
import os
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np

from unclip_jax.errors import UserError

ONE_HELD_OUT_IN = 50  # records
SPLITS = ("train", "test")


class Records(Protocol):
    """All records of a place, with a hash of each one's name."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict: ...

    def draws(self) -> np.ndarray:
        """Returns a number for each record, uint64 (records,), that depends on its name alone."""
        ...


def without_picture(source: Any, index: int) -> dict:
    """Reads a record without its picture: "caption" and "key" alone.

    A source that can do so without reading the picture's bytes has a method `without_picture`, which takes the index.
    """
    if hasattr(source, "without_picture"):
        return source.without_picture(index)
    record = source[index]
    return {name: record[name] for name in ("caption", "key")}


class Part:
    """The records of one split, in order. held_out: rising indices of those that are held out."""

    def __init__(self, records: Records, held_out: np.ndarray, split: str):
        self._records, self._split = records, split
        # Before the k-th record that is kept lie those held out whose index less their own number is at most k.
        self._indices = held_out if split == "test" else held_out - np.arange(len(held_out))
        self._length = len(held_out) if split == "test" else len(records) - len(held_out)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict:
        return self._records[self._index(index)]

    def without_picture(self, index: int) -> dict:
        return without_picture(self._records, self._index(index))

    def _index(self, index: int) -> int:
        if self._split == "test":
            return int(self._indices[index])
        return int(index + np.searchsorted(self._indices, index, side="right"))


def check_names(splits: Iterable[str]) -> None:
    """Raises UserError for splits that are not in SPLITS."""
    for split in splits:
        if split not in SPLITS:
            raise UserError(f"data.source has no split {split!r}: expected train or test, or {{split}} in its path, "
                            "for which the split's name is put")  # fmt: skip


def split_up(records: Records, place: str, splits: Iterable[str]) -> list[Part]:
    """Returns some of SPLITS of a place's records. Raises UserError where there are fewer than two records."""
    if len(records) < 2:
        raise UserError(f"{place} has one captioned picture: at least two are needed, one of them to hold out")
    chosen = held_out(records.draws())
    return [Part(records, chosen, split) for split in splits]


def held_out(draws: np.ndarray) -> np.ndarray:
    """Chooses about one record in ONE_HELD_OUT_IN by its draw alone, at least one, and never all of them."""
    chosen = np.flatnonzero(draws < 2**64 // ONE_HELD_OUT_IN)
    if not len(chosen):
        return np.array([draws.argmin()])
    return chosen if len(chosen) < len(draws) else np.delete(chosen, draws.argmax())


def draws_of_names(names: Iterable[str]) -> np.ndarray:
    """Hashes names of files, without their endings, so that two pictures with one caption are in one split."""
    stems = (os.fsencode(os.path.splitext(name)[0]) for name in names)
    return np.array([int.from_bytes(hashlib.sha256(stem).digest()[:8]) for stem in stems], np.uint64)


def draws_of_rows(file: str, rows: int) -> np.ndarray:
    """Hashes the numbers of a file's rows together with its name."""
    with np.errstate(over="ignore"):  # SplitMix64 (Steele, Lea and Flood 2014), which counts modulo 2^64
        z = draws_of_names([file]) + np.arange(1, rows + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
