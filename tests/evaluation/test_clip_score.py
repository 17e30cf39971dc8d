"""CLIP score and R-precision of embeddings that are known."""

import numpy as np
import pytest

from unclip_jax.errors import UserError
from unclip_jax.evaluation.clip_score import clip_score, r_precision


def unit(n, d=16, seed=0):
    values = np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def test_clip_score_is_glides():
    pictures, captions = unit(50, seed=1), unit(50, seed=2)
    result = clip_score(pictures, captions)
    cosines = [a @ b for a, b in zip(pictures, captions, strict=True)]
    assert result.value == pytest.approx(100 * np.mean(cosines), abs=1e-4)
    assert result.n == 50 and result.low < result.value < result.high
    assert clip_score(pictures, -pictures).value == pytest.approx(-100, abs=1e-4)  # not cut at zero


def test_r_precision_of_right_wrong_and_random_pictures():
    captions = unit(400)
    assert r_precision(captions, captions).value == 1
    assert r_precision(-captions, captions).value == 0
    result = r_precision(unit(400, seed=1), captions, distractors=3)
    assert result.low < 0.25 < result.high and result.card["chance"] == 0.25
    assert r_precision(unit(400, seed=1), captions, 3, seed=5).value != result.value


def test_r_precision_knows_equal_captions():
    """Four captions, each of several pictures; a picture's own is never among the others."""
    captions = np.repeat(unit(4), 5, axis=0)
    result = r_precision(captions, captions)
    assert result.value == 1 and result.card["distractors"] == 3 and result.n == 20
    mixed = np.roll(captions, 5, axis=0)
    assert r_precision(mixed, captions).value == 0


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="expected a caption for each picture"):
        clip_score(unit(3), unit(4))
    with pytest.raises(UserError, match="at least 2 captions that differ"):
        r_precision(unit(3), np.repeat(unit(1), 3, axis=0))
