"""Filters of training pictures, such as GLIDE's for people (arXiv 2112.10741, appendix F): an SVM with an RBF kernel
on a CLIP's embeddings, so biased that it misses fewer than 1 % of what it is to find.

    picture → three crops → embeddings → their mean → Σ w exp(-γ |x - v|²) + b ≥ 0?

scikit-learn trains it; it is stored without pickle, and decides in NumPy. The bias is set by pictures that were not
trained on: with m of n missed at it, a one-sided bound of 95 % on the rate of misses is Clopper–Pearson's, such as
0.29 % for 0 of 1,024, and about 3 / n for 0 of n. It holds for pictures like those n, and although they chose the bias:
the share of new pictures below the (m + 1)-th lowest score is distributed as the bound has it, Beta(m + 1, n - m).
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unclip_jax import npz
from unclip_jax.errors import UserError

SIDE = 224  # pixels of a crop
CROPS = 3
MARGIN = 1e-6  # by which the lowest score that counts is above 0, so that rounding does not lose it
CHUNK = 1024  # pictures that are compared with all support vectors at once


class Filter(NamedTuple):
    """An SVM that finds pictures: those whose score is 0 or more.

    card: "weights", the sha256 of the CLIP whose embeddings it takes, and more about it.
    """

    vectors: np.ndarray  # (support vectors, d)
    weights: np.ndarray  # (support vectors,): dual coefficients
    bias: float
    gamma: float
    card: dict[str, Any]

    def scores(self, pictures: np.ndarray, card: dict[str, Any]) -> np.ndarray:
        """Scores float64 (n,) of embeddings (n, d), each the mean over a picture's crops; found where 0 or more.

        card: of the features. Raises UserError where they are of another CLIP or shape.
        """
        self.check(card)
        if pictures.ndim != 2 or pictures.shape[1] != self.vectors.shape[1]:
            raise UserError(f"embeddings {pictures.shape}: expected (n, {self.vectors.shape[1]}), as it was trained on")
        lengths = np.square(self.vectors).sum(axis=1)
        found = [np.zeros(0)]
        for start in range(0, len(pictures), CHUNK):
            rows = pictures[start : start + CHUNK].astype(np.float64)
            distances = np.square(rows).sum(axis=1)[:, None] - 2 * rows @ self.vectors.T + lengths
            found.append(np.exp(-self.gamma * np.maximum(distances, 0)) @ self.weights + self.bias)
        return np.concatenate(found)

    def check(self, card: dict[str, Any]) -> None:
        """Raises UserError where features with this card are of another CLIP."""
        if card.get("weights") != self.card["weights"]:
            raise UserError(f"features of CLIP {card.get('weights')}, the filter is of {self.card['weights']}: use its")

    def biased(self, held_out: np.ndarray, rate: float) -> "Filter":
        """Raises the scores, as far as it takes, until of embeddings held out (n, d) of what is to be found the share
        that is missed is below `rate`."""
        if not len(held_out) or not 0 < rate <= 1:
            raise UserError(f"{len(held_out)} pictures held out, rate {rate}: expected some, and a rate from 0 to 1")
        missed = int(np.ceil(rate * len(held_out))) - 1
        lowest = np.sort(self.scores(held_out, self.card))[missed]
        return self._replace(bias=self.bias + max(0.0, float(MARGIN - lowest)))

    def save(self, path: str | Path) -> None:
        """Writes an .npz of vectors, weights, bias, gamma and card, on a disk or gs://..."""
        npz.save(path, self.card, vectors=self.vectors, weights=self.weights, bias=self.bias, gamma=self.gamma)

    @classmethod
    def load(cls, path: str | Path) -> "Filter":
        """Reads what `save` wrote. Raises UserError for anything else."""
        arrays, card = npz.load(path, "filter", ("vectors", "weights", "bias", "gamma"))
        return cls(arrays["vectors"], arrays["weights"], float(arrays["bias"]), float(arrays["gamma"]), card)


def fit(positives: np.ndarray, negatives: np.ndarray, card: dict[str, Any]) -> Filter:
    """Trains a filter that finds pictures like the positives, by embeddings (n, d) and (m, d), each the mean over a
    picture's crops.

    1 / γ is the embeddings' mean squared distance from their mean, which is small for a CLIP's; C = 1, and both sides
    weigh the same. card: of the features.
    Raises UserError where one side is empty, or all embeddings are the same.
    """
    from sklearn.svm import SVC

    if not len(positives) or not len(negatives):
        raise UserError(f"{len(positives)} positives and {len(negatives)} negatives: expected pictures of both")
    rows = np.concatenate([positives, negatives]).astype(np.float64)
    variance = float(rows.var(axis=0).sum())
    if not variance > 0:
        raise UserError("embeddings are all the same, or not finite: is this CLIP trained?")
    labels = np.arange(len(rows)) < len(positives)
    svm = SVC(kernel="rbf", gamma=1 / variance, class_weight="balanced").fit(rows, labels)
    return Filter(svm.support_vectors_, svm.dual_coef_[0], float(svm.intercept_[0]), 1 / variance, dict(card))


def nearest_to_boundary(scores: np.ndarray, count: int) -> np.ndarray:
    """Rows of the `count` scores nearest to 0, the nearest first: to be labelled next, and trained on."""
    return np.argsort(np.abs(scores), kind="stable")[:count]


def crops(picture: np.ndarray) -> np.ndarray:
    """Brings the shorter side of a picture, uint8 (H, W, 3), to 224 pixels and cuts three squares along the longer one,
    at both ends and in the middle: uint8 (3, 224, 224, 3)."""
    from PIL import Image

    height, width = picture.shape[:2]
    shorter = min(height, width)
    rows, columns = (max(SIDE, round(SIDE * side / shorter)) for side in (height, width))
    resized = np.asarray(Image.fromarray(picture).resize((columns, rows), Image.Resampling.BICUBIC))
    slack = max(rows, columns) - SIDE
    starts = (0, slack // 2, slack)
    longer = 0 if rows > columns else 1
    return np.stack([np.take(resized, range(start, start + SIDE), axis=longer) for start in starts])


def pooled(embeddings: np.ndarray) -> np.ndarray:
    """Mean over the crops of each picture: (3 n, d) → (n, d)."""
    return embeddings.reshape(-1, CROPS, embeddings.shape[-1]).mean(axis=1)


def split(count: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on, and a share of all that is held out, at least one of each."""
    held = min(max(1, round(share * count)), count - 1)
    order = np.random.default_rng(seed).permutation(count)
    return np.sort(order[held:]), np.sort(order[:held])
