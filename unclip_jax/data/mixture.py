"""Mixes datasets in given proportions, as unCLIP's decoder was trained on half of CLIP's data and half of DALL-E's."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from unclip_jax.data.splits import without_picture
from unclip_jax.errors import UserError

AND = " + "  # between the parts of a mixture


class Mixture:
    """The records of several sources, one source after the other; `order` mixes them.

    weights: share of each source in a batch, in any unit; (): in proportion to their numbers of records. Raises
    UserError for other weights than one positive number for each source.
    """

    def __init__(self, sources: Sequence[Any], weights: Sequence[float]):
        if weights and (len(weights) != len(sources) or not all(0 < w < math.inf for w in weights)):
            raise UserError(f"data.weights is {tuple(weights)}: expected a positive number for each of the "
                            f"{len(sources)} parts of data.source, or ()")  # fmt: skip
        self._sources, self._ends = list(sources), np.cumsum([len(source) for source in sources])
        self.mixed = tuple(zip(map(len, sources), weights or map(len, sources), strict=True))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict:
        source, index = self._within(index)
        return source[index]

    def without_picture(self, index: int) -> dict:
        return without_picture(*self._within(index))

    def _within(self, index: int) -> tuple[Any, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self._sources[part], int(index - (self._ends[part - 1] if part else 0))


def several(key: str, text: str, count: int = 0) -> list[str]:
    """Splits what "A + B" says of the parts of a mixture; one that stands alone is for all `count` parts.

    key: of the config, for messages. Raises UserError for another number of parts.
    """
    found = [part.strip() for part in text.split(AND)]
    if count and len(found) == 1:
        return found * count
    if count and len(found) != count:
        raise UserError(f"{key} is {text!r}: expected one for all {count} parts of data.source, or {count}")
    return found


def order(source: Any, seed: int) -> Any:
    """Returns the index of the record of each example, a `grain.MapDataset` without end.

    Each epoch is shuffled anew. Of a mixture, each source has epochs of its own; which source an example is of depends
    on its position alone, so that every stretch of examples has the proportions of the weights, to one percent.
    """
    import grain

    parts = getattr(source, "mixed", None)
    if not parts:
        return grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    starts = np.cumsum([0, *(length for length, _ in parts)]).tolist()
    shuffled = [
        grain.MapDataset.range(start, start + length).seed(seed + part).shuffle().repeat()
        for part, (start, (length, _)) in enumerate(zip(starts, parts, strict=False))
    ]
    return grain.MapDataset.mix(shuffled, [float(weight) for _, weight in parts])


def sample(source: Any, count: int, seed: int) -> list[int]:
    """Draws `count` different records, or all if there are fewer, in order; of a mixture, in its proportions."""
    random = np.random.default_rng(seed)
    parts = getattr(source, "mixed", None) or ((len(source), 1),)
    lengths, weights = np.array([length for length, _ in parts]), np.cumsum([weight for _, weight in parts])
    shares = np.diff(np.rint(count * weights / weights[-1]).astype(int), prepend=0)
    starts = np.cumsum(lengths) - lengths
    return [
        int(start + index)
        for start, length, share in zip(starts, lengths, shares, strict=True)
        for index in np.sort(random.choice(length, min(share, length), replace=False))
    ]
