"""Precision, recall, density and coverage: by hand, of disjoint and equal sets, for all blocks and devices."""

import jax
import numpy as np
import pytest

from unclip_jax.errors import UserError
from unclip_jax.evaluation import manifold
from unclip_jax.evaluation.intervals import wilson
from unclip_jax.evaluation.manifold import precision_recall


def rows(n, d=5, seed=0, shift=0.0, scale=1.0):
    return (scale * np.random.default_rng(seed).normal(size=(n, d)) + shift).astype(np.float32)


def by_hand(pictures, reference, k):
    """One distance after the other, in float64."""

    def distance(a, b):
        return np.linalg.norm(a.astype(np.float64) - b)

    def radii(points):
        return [sorted(distance(p, q) for i, q in enumerate(points) if i != j)[k - 1] for j, p in enumerate(points)]

    known, drawn = radii(reference), radii(pictures)
    balls = [sum(distance(p, q) <= r for q, r in zip(reference, known, strict=True)) for p in pictures]
    found = [any(distance(q, p) <= r for p, r in zip(pictures, drawn, strict=True)) for q in reference]
    covered = [any(distance(q, p) <= r for p in pictures) for q, r in zip(reference, known, strict=True)]
    shares = {"precision": np.mean(np.array(balls) > 0), "recall": np.mean(found), "coverage": np.mean(covered)}
    return shares | {"density": np.mean(balls) / k}


def values(results):
    return {name: result.value for name, result in results.items()}


@pytest.mark.parametrize("k", [1, 3])
def test_by_hand(k):
    pictures, reference = rows(60, seed=1, scale=0.7), rows(75, seed=2, shift=1.2)
    results = precision_recall(pictures, reference, k)
    assert values(results) == pytest.approx(by_hand(pictures, reference, k), abs=1e-9)
    counts = {name: result.n for name, result in results.items()}
    assert counts == dict(precision=60, density=60, recall=75, coverage=75)
    assert all(0.05 < value < 0.95 for name, value in values(results).items() if name != "density")
    recall = results["recall"]
    assert (recall.low, recall.high) == wilson(round(75 * recall.value), 75)
    assert results["density"].low < results["density"].value < results["density"].high


def test_equal_and_disjoint_sets():
    points = rows(100, 200)
    equal = values(precision_recall(points, points))
    # A ball holds its own picture and three more, the last of them on its border.
    assert 1 <= equal.pop("density") <= 4 / 3
    assert equal == dict(precision=1, recall=1, coverage=1)
    assert set(values(precision_recall(points, points + 1000)).values()) == {0.0}


def test_the_mean_costs_no_digits():
    """In float32 squares of numbers around 3,000 would hide distances around 3."""
    pictures, reference = rows(60, seed=1, scale=0.7), rows(75, seed=2, shift=1.2)
    far = precision_recall(np.float32(3000) + pictures, np.float32(3000) + reference)
    assert values(far) == pytest.approx(values(precision_recall(pictures, reference)), abs=0.03)


def test_any_blocks_and_devices_give_the_same(monkeypatch):
    pictures, reference = rows(90, seed=1, scale=0.7), rows(130, seed=2, shift=0.3)
    whole = precision_recall(pictures, reference)
    assert precision_recall(pictures, reference, devices=jax.devices()[:1]) == whole
    monkeypatch.setattr(manifold, "ROWS", 4)
    monkeypatch.setattr(manifold, "COLUMNS", 17)
    assert precision_recall(pictures, reference) == whole


def test_too_few_are_refused():
    with pytest.raises(UserError, match=r"3 pictures, 9 of the reference: expected more than k = 3 each"):
        precision_recall(rows(3), rows(9))
