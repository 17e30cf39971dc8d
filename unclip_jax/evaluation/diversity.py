"""Diversity of pictures by a CLIP's embeddings: how far apart those of one caption are, and the Vendi score of a set.

    diversity      mean of 1 - f(x) · f(y) over the pairs of pictures of a caption, and over the captions
    Vendi score    exp(-Σ λ log λ), λ the eigenvalues of f(x) · f(y) / n                         arXiv 2210.02410

The Vendi score is an effective number of different pictures: 1 if all are the same, n if all are orthogonal. It rises
with n: compare it at one n alone.
"""

import numpy as np

from unclip_jax.errors import UserError
from unclip_jax.evaluation.features import unit
from unclip_jax.evaluation.intervals import Result, jackknife, mean

GROUPS = 10  # of pictures, left out one after the other: what the Vendi score's interval is made of


def diversity(pictures: np.ndarray, captions: np.ndarray) -> Result:
    """Mean distance of two pictures of one caption, 0 to 2, of embeddings (n, d) of any length and their captions (n,),
    texts or numbers.

    n of the result is the number of captions, each of which counts the same; the interval is a bootstrap over them.
    Raises UserError for fewer than 2 captions, and for a caption with one picture.
    """
    names, own, counts = np.unique(np.asarray(captions), return_inverse=True, return_counts=True)
    if len(own) != len(pictures):
        raise UserError(f"{len(pictures)} pictures, {len(own)} captions: expected a caption for each")
    if len(names) < 2 or counts.min() < 2:
        raise UserError(f"diversity of {len(names)} captions, of which {np.sum(counts < 2)} have one picture: expected "
                        "2 captions or more, and of each 2 pictures or more")  # fmt: skip
    sums = np.zeros((len(names), pictures.shape[1]))
    np.add.at(sums, own.reshape(-1), unit(pictures.astype(np.float64)))
    # |Σ f|² = m + the sum of the cosines of all m (m - 1) pairs, in both orders.
    cosines = (np.square(sums).sum(axis=1) - counts) / (counts * (counts - 1))
    card = {"pictures": len(pictures), "pictures_a_caption": [int(counts.min()), int(counts.max())]}
    return mean("diversity", 1 - cosines, "captions", **card)


def vendi_score(pictures: np.ndarray) -> Result:
    """Vendi score of embeddings (n, d) of any length, by cosines: from 1 to min(n, d).

    The interval is a jackknife over ten groups of the pictures, row i in group i mod 10; it does not make up for a
    small n. Raises UserError for fewer than 20 pictures.
    """
    n = len(pictures)
    if n < 2 * GROUPS:
        raise UserError(f"Vendi score of {n} pictures: expected at least {2 * GROUPS}")
    rows, group = unit(pictures.astype(np.float64)), np.arange(n) % GROUPS
    value = vendi(rows)
    interval = jackknife(value, [vendi(rows[group != g]) for g in range(GROUPS)])
    return Result("Vendi score", value, *interval, n, {"interval": f"jackknife over {GROUPS} groups of the pictures"})


def vendi(rows: np.ndarray) -> float:
    """exp(-Σ λ log λ) of rows (n, d) of unit norm: λ are the eigenvalues of K / n, which those of the smaller of
    X Xᵀ / n and Xᵀ X / n are, but for zeros."""
    from scipy.linalg import eigvalsh
    from scipy.special import entr

    n, d = rows.shape
    values = eigvalsh((rows @ rows.T if n < d else rows.T @ rows) / n)
    return float(np.exp(entr(np.clip(values, 0, None)).sum()))
