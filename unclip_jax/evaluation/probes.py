"""Linear probes of a CLIP's embeddings: which of two pictures people prefer, and how high they rate one.

    preference   P(y ≻ x) = 1 / (1 + e^(f(x) - f(y))), f linear: logistic regression on y - x without an intercept,
                 with which unCLIP's settings were swept in place of people (arXiv 2204.06125, appendix A)
    rating       linear regression, in unCLIP of AVA's mean ratings; its mean over pictures is the aesthetic plot

scikit-learn fits them, and chooses how much they are held small by cross-validation. A part of the rows is held out,
and gives the probe's own accuracy or R².
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unclip_jax import npz
from unclip_jax.errors import UserError
from unclip_jax.evaluation.intervals import Result, jackknife, mean, share

HELD_OUT = 0.2  # share of the rows
FOLDS = 5  # of the cross-validation
STRENGTHS = np.logspace(-3, 3, 7)  # tried: scikit-learn's alpha, and 1 / C; of features of unit norm
GROUPS = 10  # of held-out pictures, left out one after the other: what the interval of R² is made of
FEWEST = 50  # rows to fit by and to measure by


class Probe(NamedTuple):
    """f(x) = weights · x + bias.

    card: "probe", preference or rating; "weights", the sha256 of the CLIP, as the card of its features has it; seed.
    """

    weights: np.ndarray  # float64 (d,)
    bias: float
    card: dict[str, Any]

    def __call__(self, pictures: np.ndarray, card: dict[str, Any]) -> np.ndarray:
        """Computes f of embeddings (n, d), float64 (n,).

        card: of the features. Raises UserError where they are of another CLIP or shape.
        """
        if card.get("weights") != self.card["weights"]:
            raise UserError(f"features of CLIP {card.get('weights')}, the probe is of {self.card['weights']}: use its")
        if pictures.ndim != 2 or pictures.shape[1] != len(self.weights):
            raise UserError(f"embeddings {pictures.shape}: expected (n, {len(self.weights)}), as the probe was fitted")
        return pictures.astype(np.float64) @ self.weights + self.bias

    def save(self, path: str | Path) -> None:
        """Writes an .npz of weights, bias and card, on a disk or gs://..."""
        npz.save(path, self.card, weights=self.weights, bias=self.bias)

    @classmethod
    def load(cls, path: str | Path) -> "Probe":
        """Reads what `save` wrote. Raises UserError for anything else."""
        arrays, card = npz.load(path, "probe", ("weights", "bias"))
        return cls(arrays["weights"], float(arrays["bias"]), card)


def fit_preference(
    x: np.ndarray, y: np.ndarray, preferred: np.ndarray, card: dict[str, Any], seed: int = 0
) -> tuple[Probe, Result]:
    """Fits a probe to comparisons of two pictures, and measures its accuracy on a fifth of them, which is held out.

    x, y: embeddings (n, d) of the two. preferred: whether y was, bool (n,); leave out ties. card: of the features.
    Raises UserError for fewer than 250 comparisons, or where all prefer the same side.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV

    preferred = np.asarray(preferred, bool)
    if x.shape != y.shape or preferred.shape != (len(x),):
        raise UserError(f"embeddings {x.shape}, {y.shape}, answers {preferred.shape}: expected one answer a pair")
    fit, held = _split(len(x), seed)
    if min(preferred[fit].sum(), (~preferred[fit]).sum()) < FOLDS:
        raise UserError(f"{preferred.sum()} of {len(x)} comparisons prefer the second picture: expected about half; "
                        "put the pictures of each in random order")  # fmt: skip
    difference = y.astype(np.float64) - x
    model = LogisticRegression(fit_intercept=False, max_iter=1000)
    search = GridSearchCV(model, {"C": 1 / STRENGTHS}, cv=FOLDS, scoring="neg_log_loss")
    weights = search.fit(difference[fit], preferred[fit]).best_estimator_.coef_[0]
    probe = Probe(weights, 0.0, _card("preference", card, seed, len(fit)) | {"strength": 1 / search.best_params_["C"]})
    right = (difference[held] @ weights > 0) == preferred[held]
    return probe, share("accuracy of the preference probe", right, "held-out comparisons", **probe.card)


def fit_rating(pictures: np.ndarray, ratings: np.ndarray, card: dict[str, Any], seed: int = 0) -> tuple[Probe, Result]:
    """Fits a probe to ratings (n,) of pictures, embeddings (n, d), and measures R² on a fifth of them, which is held
    out. Raises UserError for fewer than 250 pictures, and for ratings that are not finite or all the same.
    """
    from sklearn.linear_model import RidgeCV

    ratings = np.asarray(ratings, np.float64)
    if ratings.shape != (len(pictures),):
        raise UserError(f"{len(pictures)} pictures, ratings {ratings.shape}: expected one for each")
    if not np.isfinite(ratings).all() or np.ptp(ratings) == 0:
        raise UserError("ratings are all the same, or not finite: expected numbers that differ")
    fit, held = _split(len(pictures), seed)
    model = RidgeCV(alphas=STRENGTHS, cv=FOLDS).fit(pictures[fit].astype(np.float64), ratings[fit])
    about = _card("rating", card, seed, len(fit)) | {"strength": float(model.alpha_)}
    probe = Probe(model.coef_, float(model.intercept_), about)
    errors = np.square(ratings[held] - probe(pictures[held], card))

    def r_squared(kept):
        return float(1 - errors[kept].sum() / np.square(ratings[held][kept] - ratings[held][kept].mean()).sum())

    group = np.arange(len(held)) % GROUPS
    value = r_squared(group >= 0)
    interval = jackknife(value, [r_squared(group != g) for g in range(GROUPS)])
    about = probe.card | {"interval": f"jackknife over {GROUPS} groups of the held-out pictures"}
    return probe, Result("R² of the rating probe", value, *interval, len(held), about)


def mean_rating(probe: Probe, pictures: np.ndarray, card: dict[str, Any]) -> Result:
    """Mean of f over pictures, embeddings (n, d), as unCLIP's aesthetic plot has it. card: of the features."""
    return mean("mean prediction", probe(pictures, card), "pictures, the probe as it is", **probe.card)


def mean_preference(probe: Probe, x: np.ndarray, y: np.ndarray, card: dict[str, Any]) -> Result:
    """Mean of P(y ≻ x) over pairs of pictures of the same captions, embeddings (n, d). card: of the features."""
    from scipy.special import expit

    if x.shape != y.shape:
        raise UserError(f"embeddings {x.shape} and {y.shape}: expected two pictures for each caption")
    values = expit(probe(y, card) - probe(x, card))
    return mean("mean preference", values, "pairs, the probe as it is", **probe.card)


def _split(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to fit by, and those held out."""
    order, held = np.random.default_rng(seed).permutation(n), int(n * HELD_OUT)
    if held < FEWEST:
        raise UserError(f"{n} rows to fit a probe by: expected at least {int(FEWEST / HELD_OUT)}")
    return np.sort(order[held:]), np.sort(order[:held])


def _card(kind: str, card: dict[str, Any], seed: int, fitted: int) -> dict[str, Any]:
    if not card.get("weights"):
        raise UserError("the card of the features does not say weights: give clip.pictures.card")
    return card | {"probe": kind, "seed": seed, "fitted": fitted}
