"""Holds millions of names in few bytes."""

import os
from collections.abc import Iterable, Sequence

import numpy as np


class Names:
    """Texts by number, in two arrays, which are quick to pickle, store and send.

    letters: the bytes of all texts, one after the other, uint8. ends: where each text ends in them, int64.
    """

    def __init__(self, letters: np.ndarray, ends: np.ndarray):
        self.letters, self.ends = letters, ends

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Names":
        """Holds texts, among them names of files that are not UTF-8."""
        parts = [os.fsencode(text) for text in texts]
        ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        return cls(np.frombuffer(b"".join(parts), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.letters[start : self.ends[index]].tobytes())

    @classmethod
    def joined(cls, several: Sequence["Names"]) -> "Names":
        """Joins texts one after the other."""
        starts = np.cumsum([0, *(len(names.letters) for names in several)])
        ends = [names.ends + start for names, start in zip(several, starts, strict=False)]
        letters = [names.letters for names in several]
        nothing = cls.of([])
        return cls(np.concatenate([nothing.letters, *letters]), np.concatenate([nothing.ends, *ends]))

    def part(self, start: int, stop: int) -> "Names":
        """Returns the texts start … stop - 1."""
        first = int(self.ends[start - 1]) if start else 0
        last = int(self.ends[stop - 1]) if stop else 0
        return Names(self.letters[first:last], self.ends[start:stop] - first)
