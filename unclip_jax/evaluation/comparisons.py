"""Compares arms of an experiment by what was measured of each picture: means, differences, and their 95 % intervals.

Values are arrays (S, C, D): of S training seeds, C captions and D pictures of each caption. NaN stands where a picture
has no value. The rows are not independent: pictures of one caption are alike, and so are those of one trained model. So
the bootstrap draws training seeds, then captions, then pictures of each caption, all with replacement (Davison and
Hinkley, Bootstrap Methods, 1997, section 3.8). Two arms are compared on the same seeds and captions.
"""

from typing import Any

import numpy as np

from unclip_jax.evaluation.intervals import DRAWS, SHARE, Result


def mean(name: str, values: np.ndarray, **card: Any) -> Result:
    """Computes the mean of the values (S, C, D) that are not NaN, whose number is the result's n; NaN for none."""
    return _result(name, values, _means(values), **card)


def difference(name: str, first: np.ndarray, second: np.ndarray, **card: Any) -> Result:
    """Computes the mean of `first` less that of `second`, arrays (S, C, D) for the same captions.

    One of them may have a single training seed. The result's n is the smaller of the two numbers of values. An interval
    with 0 inside does not tell them apart. Raises ValueError for other captions, pictures or numbers of seeds.
    """
    if first.shape[1:] != second.shape[1:] or (first.shape != second.shape and 1 not in (len(first), len(second))):
        raise ValueError(f"arms of {first.shape} and {second.shape} values: expected the same seeds and captions")
    fewer = min(first, second, key=lambda values: np.isfinite(values).sum())
    found = _result(name, fewer, _means(first) - _means(second), **card)
    return found._replace(value=float(np.nanmean(first) - np.nanmean(second))) if found.n else found


def _result(name: str, values: np.ndarray, means: np.ndarray, **card: Any) -> Result:
    n = int(np.isfinite(values).sum())
    shape = dict(zip(("training_seeds", "captions", "draws"), values.shape, strict=True))
    if not n:
        return Result(name, float("nan"), float("nan"), float("nan"), 0, card | shape)
    low, high = np.nanquantile(means, [(1 - SHARE) / 2, (1 + SHARE) / 2])
    return Result(name, float(np.nanmean(values)), float(low), float(high), n, card | shape)


def _means(values: np.ndarray, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Computes the means of so many samples, (draws,). Arrays of as many captions get the same captions each time."""
    seeds, captions, pictures = values.shape
    known = np.isfinite(values)
    values = np.where(known, values, 0.0)
    found = np.empty(draws)
    for k in range(draws):
        rng = np.random.default_rng((seed, k))
        c = rng.integers(captions, size=(1, captions, 1))  # the same for all training seeds
        s = rng.integers(seeds, size=(seeds, 1, 1))
        d = rng.integers(pictures, size=(seeds, captions, pictures))
        count = known[s, c, d].sum()
        found[k] = values[s, c, d].sum() / count if count else np.nan
    return found
