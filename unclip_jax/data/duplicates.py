"""Finds pictures that a dataset holds twice: the very same pixels, or a look that differs in few of 64 bits.

    picture → brightness, 32 x 32 → cosine transform → 8 x 8 lowest frequencies → above their median? → 64 bits

That is the hash of the ImageHash library (`phash`). It knows nothing of colour, and all plain pictures look the same to
it. A record is a duplicate of the earlier one. So the same records are kept in whatever order they are compared, and
any two records that are kept differ.

Nothing compares all pairs. Two looks that differ in d bits agree in one of d + 1 bands of bits at least: only looks
that share a band are compared, each group on its own.
"""

import functools
import hashlib
import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import apache_beam as beam

SIDE, LOW, BITS = 32, 8, 64  # pixels; frequencies that are kept in each direction; bits of a look
MOST_BITS = 7  # that near duplicates may differ in: with more, bands are so narrow that each holds nearly all looks
AT_ONCE = 2**22  # pairs that are compared at once
EXACT, NEAR = "exact-duplicates", "near-duplicates"


def digest(picture: np.ndarray) -> str:
    """Hashes the pixels of a picture, uint8 (H, W, 3): 32 hexadecimal digits of their SHA-256."""
    return hashlib.sha256(repr(picture.shape).encode() + np.ascontiguousarray(picture).tobytes()).hexdigest()[:32]


def look(picture: np.ndarray) -> str:
    """Computes the 64 bits of how a picture looks, uint8 (H, W, 3): 16 hexadecimal digits, low frequencies first."""
    from PIL import Image

    grey = Image.fromarray(picture).convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    waves = _waves()
    low = np.round(waves @ np.asarray(grey, np.float64) @ waves.T, 6)  # rounding errors decide no bit
    return np.packbits(low > np.median(low)).tobytes().hex()


@functools.cache
def _waves() -> np.ndarray:
    """The lowest frequencies of the cosine transform (DCT-II): float64 (LOW, SIDE)."""
    return np.cos(np.pi / SIDE * np.outer(np.arange(LOW), np.arange(SIDE) + 0.5))


def find(records: "beam.PCollection", exact: bool, bits: int | None) -> "beam.PCollection":
    """Finds duplicates: (index, digest, look) of records → (index, EXACT or NEAR) of those to leave out, each once.

    exact: whether records of the digest of an earlier one are. bits: whether records are whose look differs from an
    earlier one's in so many bits at most, 0 … MOST_BITS; None: none are. Of a group of records that share a digest, a
    look or a band of looks, one worker holds the indices and the looks in memory.
    """
    import apache_beam as beam

    found = []
    if exact:
        groups = records | "by digest" >> beam.GroupBy(_digest)
        found.append(groups | "exact" >> beam.FlatMap(_all_but_first, EXACT))
        records = groups | "first of each digest" >> beam.Map(_first)
    if bits is not None:
        groups = records | "by look" >> beam.GroupBy(_look)
        found.append(groups | "same look" >> beam.FlatMap(_all_but_first, NEAR))
    if bits:
        bands = groups | "first of each look" >> beam.Map(_first) | "bands" >> beam.FlatMap(_bands, bits + 1)
        near = bands | "by band" >> beam.GroupByKey() | "near" >> beam.FlatMap(_near, bits)
        found.append(near | "in several bands" >> beam.Distinct())
    return found | "all duplicates" >> beam.Flatten()


def _digest(record: tuple[int, str, str]) -> str:
    return record[1]


def _look(record: tuple[int, str, str]) -> str:
    return record[2]


def _first(group: tuple[Any, Iterable[tuple[int, str, str]]]) -> tuple[int, str, str]:
    return min(group[1])


def _all_but_first(group: tuple[Any, Iterable[tuple[int, str, str]]], step: str) -> Iterator[tuple[int, str]]:
    first = _first(group)[0]
    return ((record[0], step) for record in group[1] if record[0] != first)


def _bands(record: tuple[int, str, str], count: int) -> Iterator[tuple[tuple[int, int], tuple[int, str]]]:
    """Cuts a look into bands: yields ((band, its bits), (index, look))."""
    index, _, digits = record
    edges = [BITS * k // count for k in range(count + 1)]
    for band, (low, high) in enumerate(itertools.pairwise(edges)):
        yield (band, int(digits, 16) >> low & ((1 << high - low) - 1)), (index, digits)


def _near(group: tuple[tuple[int, int], Iterable[tuple[int, str]]], bits: int) -> Iterator[tuple[int, str]]:
    """Yields (index, NEAR) for each of a group's looks, all different, that is near an earlier one's."""
    records = sorted(group[1])
    looks = np.array([int(digits, 16) for _, digits in records], np.uint64)
    rows = max(1, AT_ONCE // len(looks))
    for start in range(0, len(looks), rows):
        part = looks[start : start + rows]
        near = np.bitwise_count(part[:, None] ^ looks[None, : start + len(part)]) <= bits
        near &= np.arange(start + len(part))[None] < np.arange(start, start + len(part))[:, None]
        for row in np.flatnonzero(near.any(axis=1)).tolist():
            yield records[start + row][0], NEAR
