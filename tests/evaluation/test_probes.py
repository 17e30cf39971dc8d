"""Probes on embeddings whose preferences and ratings are known, against scikit-learn and closed forms."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import r2_score

from unclip_jax.errors import UserError
from unclip_jax.evaluation import probes
from unclip_jax.evaluation.intervals import wilson

CARD = {"network": "CLIP", "weights": "abc"}
TASTE = np.array([4.0, -3.0, 2.0, 0.0, 0.0, 1.0])


def unit(n, seed, d=6):
    values = np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def comparisons(n, seed=0, strength=3.0):
    """Pairs, and answers drawn with the model's own probabilities."""
    x, y = unit(n, 2 * seed), unit(n, 2 * seed + 1)
    p = 1 / (1 + np.exp(strength * (x - y) @ TASTE))
    return x, y, np.random.default_rng(100 + seed).random(n) < p


def test_preference_probe_finds_the_taste():
    x, y, preferred = comparisons(4000)
    probe, result = probes.fit_preference(x, y, preferred, CARD)
    cosine = probe.weights @ TASTE / np.linalg.norm(probe.weights) / np.linalg.norm(TASTE)
    assert cosine > 0.99 and probe.bias == 0
    np.testing.assert_allclose(probe.weights, 3 * TASTE, atol=1.2)
    # Nobody is right more often than the answers' own probabilities let them be.
    best = np.mean(np.maximum(p := 1 / (1 + np.exp(3 * (x - y) @ TASTE)), 1 - p))
    assert result.n == 800 and result.low < best < result.high
    assert (result.low, result.high) == wilson(round(800 * result.value), 800)
    assert result.card["weights"] == "abc" and result.card["probe"] == "preference" and result.card["fitted"] == 3200


def test_preference_probe_is_scikit_learns_and_has_two_sides():
    """P(y ≻ x) + P(x ≻ y) = 1; the coefficients are those of a fit by the same strength on the same rows."""
    x, y, preferred = comparisons(500)
    probe, _ = probes.fit_preference(x, y, preferred, CARD, seed=3)
    fit, held = probes._split(500, 3)
    assert len(held) == 100 and not set(fit) & set(held)
    model = LogisticRegression(C=1 / probe.card["strength"], fit_intercept=False).fit((y - x)[fit], preferred[fit])
    np.testing.assert_allclose(probe.weights, model.coef_[0], rtol=1e-3, atol=1e-3)
    forth, back = probes.mean_preference(probe, x, y, CARD), probes.mean_preference(probe, y, x, CARD)
    assert forth.value == pytest.approx(1 - back.value) and forth.low < forth.value < forth.high and forth.n == 500
    expected = model.predict_proba(y - x)[:, 1].mean()
    assert forth.value == pytest.approx(expected, abs=1e-3)
    assert probes.mean_preference(probe, x, x, CARD).value == 0.5


def test_rating_probe_finds_ratings_and_their_noise():
    """Ratings of variance s² by the embedding and 1 by chance: R² is s² / (s² + 1)."""
    pictures = unit(5000, 0)
    ratings = pictures @ TASTE * 0.8 + 5 + np.random.default_rng(1).normal(size=5000)
    probe, result = probes.fit_rating(pictures, ratings, CARD)
    assert probe.bias == pytest.approx(5, abs=0.1)
    np.testing.assert_allclose(probe.weights, 0.8 * TASTE, atol=0.3)
    signal = np.var(pictures @ TASTE * 0.8)
    assert result.low < signal / (signal + 1) < result.high and result.n == 1000
    _, held = probes._split(5000, 0)
    assert result.value == pytest.approx(r2_score(ratings[held], probe(pictures[held], CARD)), abs=1e-9)
    mean = probes.mean_rating(probe, pictures[held], CARD)
    assert mean.value == pytest.approx((pictures[held] @ probe.weights).mean() + probe.bias, abs=1e-5)
    assert mean.low < ratings.mean() < mean.high and mean.n == 1000


def test_where_there_is_nothing_to_find_none_is_found():
    pictures = unit(1000, 0)
    _, result = probes.fit_rating(pictures, np.random.default_rng(1).normal(size=1000), CARD)
    assert result.low < 0.02 and result.value < 0.05
    _, result = probes.fit_preference(pictures, unit(1000, 1), np.random.default_rng(2).random(1000) < 0.5, CARD)
    assert result.low < 0.5 < result.high


def test_probe_is_stored_and_read(tmp_path):
    probe, _ = probes.fit_rating(unit(300, 0), unit(300, 0) @ TASTE, CARD)
    probe.save(tmp_path / "probe.npz")
    back = probes.Probe.load(tmp_path / "probe.npz")
    assert back.card == probe.card and back.bias == probe.bias
    np.testing.assert_array_equal(back(unit(9, 1), CARD), probe(unit(9, 1), CARD))
    np.savez(tmp_path / "other.npz", weights=probe.weights)
    with pytest.raises(UserError, match=r"other.npz holds no probe: expected an .npz of weights, bias and card"):
        probes.Probe.load(tmp_path / "other.npz")


def test_what_cannot_be_fitted_is_refused():
    x, y, preferred = comparisons(300)
    probe, _ = probes.fit_rating(x, x @ TASTE, CARD)
    for does, says in (
        (lambda: probe(x, {"weights": "xyz"}), "features of CLIP xyz, the probe is of abc"),
        (lambda: probe(x[:, :2], CARD), r"expected \(n, 6\)"),
        (lambda: probes.mean_preference(probe, x, y[:5], CARD), "two pictures for each"),
        (lambda: probes.fit_preference(x, y[:5], preferred, CARD), "one answer a pair"),
        (lambda: probes.fit_preference(x, y, preferred | True, CARD), "in random order"),
        (lambda: probes.fit_preference(x[:99], y[:99], preferred[:99], CARD), "at least 250"),
        (lambda: probes.fit_preference(x, y, preferred, {}), "does not say weights"),
        (lambda: probes.fit_rating(x, preferred[:9], CARD), "one for each"),
        (lambda: probes.fit_rating(x, np.ones(300), CARD), "all the same"),
        (lambda: probes.fit_rating(x, np.full(300, np.nan), CARD), "not finite"),
    ):
        with pytest.raises(UserError, match=says):
            does()
