"""Distances between two sets of pictures by their features: FID and sFID by moments, KID and CMMD by kernels.

    FID, sFID   |μ - μ_r|² + tr(Σ + Σ_r - 2 (Σ Σ_r)^½)                               arXiv 1706.08500, 2103.03841
    KID         MMD², k(x, y) = (x · y / d + 1)³, unbiased                           arXiv 1801.01401
    CMMD        1000 MMD², k(x, y) = exp(-|x - y|² / 2σ²), σ = 10, of CLIP's x, y    arXiv 2401.09603

Less is nearer. FID falls with the number of pictures: compare it at one n alone. All is computed in float64.
"""

import dataclasses
import functools
import operator
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from unclip_jax import npz
from unclip_jax.errors import UserError
from unclip_jax.evaluation.devices import rebatched
from unclip_jax.evaluation.intervals import Result, around, jackknife

GROUPS = 10  # of pictures, left out one after the other: what an interval is made of
CHUNK = 512  # rows of a group that go into its moments at once
BLOCK = 1000  # pictures of a block of KID, about
SIGMA = 10.0  # of CMMD
SAME = ("weights", "features")  # of two cards, if their numbers are to be compared
STORED = (*SAME, "source", "crop", "resize")  # of a card that is stored with its statistics


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """First two moments of n rows of features.

    card: where they are from, as JSON can hold it: "weights" and "features", which must agree where two are compared;
    and what the caller knows: "source", "crop" and "resize" of the pictures, before the network's own, and more.
    """

    n: int
    mean: np.ndarray  # float64 (d,)
    scatter: np.ndarray  # float64 (d, d): Σ (x - mean) (x - mean)ᵀ
    card: dict[str, Any]

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased: divided by n - 1."""
        return self.scatter / (self.n - 1)

    def __add__(self, other: "Statistics") -> "Statistics":
        """Moments of both sets of rows together (Chan's formula)."""
        if not self.n:
            return other
        n, step = self.n + other.n, other.mean - self.mean
        between = np.outer(step, step) * (self.n * other.n / n)
        return Statistics(n, self.mean + step * (other.n / n), self.scatter + other.scatter + between, self.card)

    def without(self, part: "Statistics") -> "Statistics":
        """Moments of the rows that are not in `part`, some of these."""
        n = self.n - part.n
        step = (self.mean - part.mean) * (self.n / n)  # the part's mean → the others'
        between = np.outer(step, step) * (n * part.n / self.n)
        return Statistics(n, part.mean + step, self.scatter - part.scatter - between, self.card)

    def save(self, path: str | Path) -> None:
        """Writes an .npz of n, mean, covariance and the card: on a disk or gs://..., all of it or nothing.

        Raises UserError where the card does not say "weights", "features", "source", "crop" and "resize".
        """
        if missing := [key for key in STORED if key not in self.card]:
            raise UserError(f"the card of the statistics does not say {', '.join(missing)}: add them")
        npz.save(path, self.card, n=self.n, mean=self.mean, covariance=self.covariance)

    @classmethod
    def load(cls, path: str | Path) -> "Statistics":
        """Reads what `save` wrote. Raises UserError for anything else."""
        arrays, card = npz.load(path, "statistics", ("n", "mean", "covariance"))
        n = int(arrays["n"])
        return cls(n, arrays["mean"], arrays["covariance"] * (n - 1), card)


def grouped_statistics(batches: Iterable[np.ndarray], groups: int, card: dict[str, Any]) -> list[Statistics]:
    """Statistics of each of `groups` parts of all rows, which come in batches (n, d) of any size: row i is in part
    i mod groups."""
    found = [Statistics(0, np.zeros(0), np.zeros((0, 0)), card)] * groups
    for chunk in rebatched(batches, groups * CHUNK):
        for group in range(groups):
            if len(rows := chunk[group::groups]):
                found[group] += _moments(rows.astype(np.float64), card)
    count = sum(part.n for part in found)
    if count < 2 * groups:
        raise UserError(f"statistics of {count} pictures: expected at least {2 * groups}")
    return found


def statistics(batches: Iterable[np.ndarray], card: dict[str, Any]) -> Statistics:
    """Statistics of all rows, which come in batches (n, d) of any size."""
    return grouped_statistics(batches, 1, card)[0]


def fid(pictures: list[Statistics], reference: Statistics) -> Result:
    """FID of pictures drawn, as `grouped_statistics` of their pooled features gives them, against a reference.

    Of features "spatial", by the card, it is sFID. The interval is of what other pictures of the same model would give,
    by leaving out one group after the other; the reference is taken as it is, and the interval does not make up for a
    small n.
    """
    whole = functools.reduce(operator.add, pictures)
    _check_same(whole.card, reference.card)
    root = _root(reference.covariance)
    value = _distance(whole, reference, root)
    without = [_distance(whole.without(part), reference, root) for part in pictures]
    card = {"pictures": whole.card, "reference": reference.card | {"n": reference.n}}
    name = "sFID" if whole.card.get("features") == "spatial" else "FID"
    return Result(name, value, *jackknife(value, without), whole.n, card | _jackknifed(len(pictures)))


def frechet_distance(one: Statistics, other: Statistics) -> float:
    """|μ - μ'|² + tr(Σ + Σ' - 2 (Σ Σ')^½), which is symmetric.

    tr (Σ Σ')^½ is the sum of the roots of the eigenvalues of Σ'^½ Σ Σ'^½: those of Σ Σ', but of a symmetric matrix.
    What is below zero by rounding counts as zero. guided-diffusion and the original code take `scipy.linalg.sqrtm` of
    Σ Σ'; where that is not finite they add 1e-6 to both diagonals, and they drop imaginary parts below 1e-3. Neither
    can come up here, so nothing is ever added, not for fewer pictures than features either.
    """
    return _distance(one, other, _root(other.covariance))


def kid(pictures: np.ndarray, reference: np.ndarray, blocks: int | None = None) -> Result:
    """KID of pooled features (n, d) and (m, d): unbiased, so that it may be below zero.

    The mean over disjoint blocks, row i in block i mod `blocks`, whose spread gives the interval, of both sets as
    samples. blocks: so many that a block of the smaller set has at most 1,000 rows, and at least 10. (Others draw 100
    subsets of 1,000 rows, which overlap, and report the spread of single subsets.)
    """
    smaller = min(len(pictures), len(reference))
    blocks = blocks or max(GROUPS, -(-smaller // BLOCK))
    if smaller < 2 * blocks or blocks < 2:
        raise UserError(f"KID of {smaller} pictures in {blocks} blocks: expected 2 blocks of 2 pictures or more")
    values = [polynomial_mmd(pictures[b::blocks], reference[b::blocks]) for b in range(blocks)]
    value, error = float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(blocks))
    card = {"reference": {"n": len(reference)}, "blocks": blocks, "standard_error": error}
    card["interval"] = "Student's, of the mean over the blocks"
    return Result("KID", value, *around(value, error, blocks - 1), len(pictures), card)


def polynomial_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased MMD² of (n, d) and (m, d) by KID's kernel."""
    x, y = (rows.astype(np.float64) for rows in (x, y))

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    within = [(np.sum(k) - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (kernel(x, x), kernel(y, y))]
    return float(sum(within) - 2 * np.mean(kernel(x, y)))


def cmmd(pictures: np.ndarray, reference: np.ndarray) -> Result:
    """CMMD of a CLIP's embeddings (n, d) and (m, d), of any length: they are brought to unit norm.

    All pairs count, a row with itself too, as in the authors' code. The published numbers are of ViT-L/14 at 336
    pixels; another CLIP gives others. The interval is as FID's.
    """
    if len(pictures) < 2 * GROUPS or len(reference) < 2:
        raise UserError(f"CMMD of {len(pictures)} and {len(reference)} pictures: expected {2 * GROUPS} and 2 or more")
    x, y = (rows.astype(np.float64) for rows in (pictures, reference))
    x, y = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (x, y))
    x, y = ([rows[g::GROUPS] for g in range(GROUPS)] for rows in (x, y))
    xx, xy, yy = _rbf_sums(x, x), _rbf_sums(x, y).sum(axis=1), _rbf_sums(y, y).sum()
    counts, m = np.array([len(rows) for rows in x]), len(reference)

    def mmd(kept):
        n = counts[kept].sum()
        return 1000 * float(xx[kept][:, kept].sum() / n**2 + yy / m**2 - 2 * xy[kept].sum() / (n * m))

    value = mmd(np.ones(GROUPS, bool))
    without = [mmd(np.arange(GROUPS) != g) for g in range(GROUPS)]
    card = {"reference": {"n": m}, "sigma": SIGMA, "scale": 1000} | _jackknifed(GROUPS)
    return Result("CMMD", value, *jackknife(value, without), len(pictures), card)


def _rbf_sums(x: list[np.ndarray], y: list[np.ndarray]) -> np.ndarray:
    """Sums of k(x, y) - 1 over each group of x and of y, of unit norm. The 1, which cancels, would cost digits."""
    return np.array([[np.expm1((a @ b.T - 1) / SIGMA**2).sum() for b in y] for a in x])


def _moments(rows: np.ndarray, card: dict[str, Any]) -> Statistics:
    mean = rows.mean(axis=0)
    centred = rows - mean
    return Statistics(len(rows), mean, centred.T @ centred, card)


def _root(covariance: np.ndarray) -> np.ndarray:
    """The symmetric square root of a covariance."""
    from scipy.linalg import eigh

    values, vectors = eigh(covariance)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


def _distance(one: Statistics, other: Statistics, root: np.ndarray) -> float:
    """`frechet_distance`, given the root of the other's covariance."""
    from scipy.linalg import eigvalsh

    covariance = one.covariance
    product = np.sqrt(np.clip(eigvalsh(root @ covariance @ root), 0, None)).sum()
    spread = np.trace(covariance) + np.trace(other.covariance) - 2 * product
    return float(np.square(one.mean - other.mean).sum() + spread)


def _check_same(card: dict[str, Any], other: dict[str, Any]) -> None:
    for key in SAME:
        if card.get(key) != other.get(key):
            raise UserError(f"{key} of the pictures {card.get(key)}, of the reference {other.get(key)}: use the same")


def _jackknifed(groups: int) -> dict[str, Any]:
    return {"interval": f"jackknife over {groups} groups of the pictures; the reference is taken as it is"}
