"""Pictures that are too near to others: drawings to their training pictures, and a test set to the training set.

Nearness is the cosine of a CLIP's embeddings.

    regurgitation   how near is each drawing to its own training picture, and how near is the nearest other?
                    (GLIDE, arXiv 2112.10741, appendix F)
    near            share of a set with a match at a threshold, which a "filtered" FID leaves out: 21 % of COCO's
                    validation set, at a threshold set by hand (DALL-E, 2102.12092; GLIDE)

    cosines, _ = nearest(validation, training)
    sweep(cosines[:, 0], [0.8, 0.85, 0.9, 0.95])      # look at pictures near each threshold, and choose one
    kept = validation_pictures[cosines[:, 0] < 0.9]
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from unclip_jax.errors import UserError
from unclip_jax.evaluation.devices import rebatched
from unclip_jax.evaluation.features import unit
from unclip_jax.evaluation.intervals import Result, mean, share

BLOCK = 65_536  # rows that are compared at once
PAIRS = 20  # nearest ones that are listed


class Pair(NamedTuple):
    """A drawing, the training picture that it is near to, both as row numbers, and their cosine."""

    drawing: int
    training: int
    cosine: float


class Regurgitation(NamedTuple):
    """Nearness of drawings to their own training pictures.

    results: "own", mean cosine to it; "other", to the nearest other; "own_near" and "other_near", shares at the
        threshold; "nearer_to_own", share nearer to its own than to any other: of drawings of captions alone, much more
        than the others' nearness explains is what to look for.
    pairs: the nearest (drawing, its own), the nearest first, to be looked at.
    """

    results: dict[str, Result]
    pairs: list[Pair]


def nearest(
    pictures: np.ndarray, training: np.ndarray | Iterable[np.ndarray], k: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Cosines (n, k) and row numbers (n, k) of the k training pictures nearest to each picture, the nearest first.

    All pairs are compared, by FAISS's IndexFlatIP, a block of the training set at a time. pictures (n, d), training
    (m, d), or batches of it: embeddings of any length. Raises UserError for fewer than k training pictures.
    """
    import faiss

    batches = [training] if isinstance(training, np.ndarray) else training
    queries = _float32(pictures)
    cosines = np.full((len(queries), k), -np.inf, np.float32)
    rows = np.full((len(queries), k), -1, np.int64)
    start = 0
    for block in rebatched(batches, BLOCK):
        index = faiss.IndexFlatIP(queries.shape[1])
        index.add(_float32(block))
        found, places = index.search(queries, min(k, len(block)))
        found, places = np.hstack([cosines, found]), np.hstack([rows, places + start])
        order = np.argsort(-found, axis=1, kind="stable")[:, :k]
        cosines, rows = (np.take_along_axis(array, order, axis=1) for array in (found, places))
        start += len(block)
    if start < k:
        raise UserError(f"{start} training pictures: expected at least {k}, to find so many near to each picture")
    return cosines, rows


def near(cosines: np.ndarray, threshold: float) -> Result:
    """Share of pictures whose nearest match, by its cosine (n,), is at a threshold or above, with Wilson's interval."""
    return share("share with a near match", cosines >= threshold, "pictures", threshold=threshold)


def sweep(cosines: np.ndarray, thresholds: Sequence[float]) -> list[Result]:
    """`near` at each threshold."""
    return [near(cosines, threshold) for threshold in thresholds]


def regurgitation(
    drawings: np.ndarray,
    training: np.ndarray,
    threshold: float,
    own: np.ndarray | None = None,
    pairs: int = PAIRS,
) -> Regurgitation:
    """Compares drawings (n, d), made from captions of training pictures, with the training set (m, d) by embeddings of
    any length.

    own: row of each drawing's training picture, (n,); by default row i is drawing i's. threshold: cosine from which a
    pair is near. Raises UserError where `own` is no such rows, and for fewer than 2 training pictures.
    """
    if own is None:
        own = np.arange(len(drawings))
    if own.shape != (len(drawings),) or not len(own) or own.min() < 0 or own.max() >= len(training):
        raise UserError(f"{len(drawings)} drawings, {len(training)} training pictures: expected each drawing's own row")
    to_own = np.sum(unit(drawings.astype(np.float64)) * unit(training[own].astype(np.float64)), axis=1)
    cosines, rows = nearest(drawings, training, 2)
    to_other = np.where(rows[:, 0] == own, cosines[:, 1], cosines[:, 0]).astype(np.float64)
    card = {"training": len(training)}
    results = {
        "own": mean("cosine to its own training picture", to_own, "drawings", **card),
        "other": mean("cosine to the nearest other", to_other, "drawings", **card),
        "own_near": share("share near to its own", to_own >= threshold, "drawings", threshold=threshold, **card),
        "other_near": share("share near to another", to_other >= threshold, "drawings", threshold=threshold, **card),
        "nearer_to_own": share("share nearer to its own than to any other", to_own > to_other, "drawings", **card),
    }
    first = np.argsort(-to_own, kind="stable")[:pairs]
    return Regurgitation(results, [Pair(int(i), int(own[i]), float(to_own[i])) for i in first])


def _float32(rows: np.ndarray) -> np.ndarray:
    """Rows of unit norm as FAISS takes them."""
    return np.ascontiguousarray(unit(rows), np.float32)
