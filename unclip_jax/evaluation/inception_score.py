"""Inception Score (arXiv 1606.03498): exp E KL(p(class | picture) ‖ p(class)), for pictures both sure and varied."""

import numpy as np

from unclip_jax.errors import UserError
from unclip_jax.evaluation.intervals import Result, jackknife

SPLIT = 5000  # pictures that a score is of
GROUPS = 10  # of a split's pictures, left out one after the other: what the interval is made of


def inception_score(logits: np.ndarray, split: int = SPLIT) -> Result:
    """Mean over consecutive splits of the rows of logits (n, classes), those without bias.

    There are n // split splits, at least one, of equal size but for one row; the score rises with the size. Computed in
    float64. The card has "std", the standard deviation over the splits, as others report it. Raises UserError for fewer
    than 20 pictures.
    """
    from scipy.special import log_softmax, xlogy

    n = len(logits)
    if n < 2 * GROUPS:
        raise UserError(f"Inception Score of {n} pictures: expected at least {2 * GROUPS}")
    scores, without = [], []
    for part in np.array_split(logits, max(1, n // split)):
        logs = log_softmax(part.astype(np.float64), axis=1)
        p = np.exp(logs)
        group = np.arange(len(part)) % GROUPS
        counts = np.bincount(group)
        sums = np.stack([p[group == g].sum(axis=0) for g in range(GROUPS)])
        entropies = np.bincount(group, (p * logs).sum(axis=1))

        def score(kept, counts=counts, sums=sums, entropies=entropies):
            total = counts[kept].sum()
            marginal = sums[kept].sum(axis=0) / total
            return float(np.exp(entropies[kept].sum() / total - xlogy(marginal, marginal).sum()))

        scores.append(score(np.ones(GROUPS, bool)))
        without.append([score(np.arange(GROUPS) != g) for g in range(GROUPS)])
    value = float(np.mean(scores))
    card = {"splits": len(scores), "std": float(np.std(scores))}
    card["interval"] = f"jackknife over {GROUPS} groups of the pictures"
    return Result("Inception Score", value, *jackknife(value, np.mean(without, axis=0)), n, card)
