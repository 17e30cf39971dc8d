"""CLIP score and R-precision: do pictures show what their captions say, as a CLIP sees it?

The CLIP that guided or ranked the pictures, or that a decoder was trained by, is no judge of them: use another.
"""

import numpy as np

from unclip_jax.errors import UserError
from unclip_jax.evaluation.intervals import Result, bootstrap, wilson

SCALE = 100.0
DISTRACTORS = 99


def clip_score(pictures: np.ndarray, captions: np.ndarray) -> Result:
    """E[s f(x) · g(c)], s = 100 (arXiv 2112.10741, figure 6), of embeddings (n, d) of unit norm, row by row.

    Not CLIPScore (2104.08718), which is 2.5 max(f · g, 0).
    """
    _check(pictures, captions)
    scores = SCALE * np.sum(np.multiply(pictures, captions, dtype=np.float64), axis=1)
    card = {"scale": SCALE, "interval": "bootstrap over the pictures"}
    return Result("CLIP score", float(scores.mean()), *bootstrap(scores), len(scores), card)


def r_precision(pictures: np.ndarray, captions: np.ndarray, distractors: int = DISTRACTORS, seed: int = 0) -> Result:
    """Share of pictures that are nearer to their own caption than to `distractors` others, drawn from the other rows'.

    Embeddings (n, d) of unit norm, row by row; equal rows of captions are one caption. Where there are too few, all the
    others are taken; the card has their number and chance. Raises UserError where there is no other at all.
    """
    _check(pictures, captions)
    distinct, own = np.unique(captions, axis=0, return_inverse=True)
    count = min(distractors, len(distinct) - 1)
    if count < 1:
        raise UserError(f"R-precision with {count} other captions: expected at least 2 captions that differ")
    rng = np.random.default_rng(seed)
    hits = 0
    for picture, right in zip(pictures, own.reshape(-1), strict=True):
        wrong = rng.choice(len(distinct) - 1, count, replace=False)
        wrong += wrong >= right
        hits += bool(picture @ distinct[right] > np.max(distinct[wrong] @ picture))
    n = len(pictures)
    card = {"distractors": count, "chance": 1 / (1 + count), "seed": seed, "interval": "Wilson's, over the pictures"}
    return Result("R-precision", hits / n, *wilson(hits, n), n, card)


def _check(pictures: np.ndarray, captions: np.ndarray) -> None:
    if pictures.shape != captions.shape or not len(pictures):
        raise UserError(f"embeddings {pictures.shape} and {captions.shape}: expected a caption for each picture")
