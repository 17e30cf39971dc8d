"""Nearest pictures against a loop over all pairs; copies are found, in embeddings and in pictures."""

import numpy as np
import pytest

from unclip_jax.data import emoji_scenes
from unclip_jax.errors import UserError
from unclip_jax.evaluation import neighbours
from unclip_jax.evaluation.intervals import wilson


def unit(n, seed, d=16):
    values = np.random.default_rng(seed).normal(size=(n, d))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("block", [7, 1000])
def test_nearest_is_that_of_all_pairs(block, monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK", block)
    pictures, training = unit(20, 0), unit(45, 1)
    every = pictures @ training.T
    for given in (3 * training, iter([training[:10], training[10:12], training[12:]])):
        cosines, rows = neighbours.nearest(2 * pictures, given, 9)
        np.testing.assert_array_equal(rows, np.argsort(-every, axis=1)[:, :9])
        np.testing.assert_allclose(cosines, -np.sort(-every, axis=1)[:, :9], atol=1e-6)
    with pytest.raises(UserError, match="45 training pictures: expected at least 46"):
        neighbours.nearest(pictures, training, 46)


def test_sweep_counts_matches_at_each_threshold():
    cosines = np.array([0.2, 0.5, 0.9, 0.95, 1.0])
    results = neighbours.sweep(cosines, [0.1, 0.5, 0.93, 1.1])
    assert [round(5 * result.value) for result in results] == [5, 4, 2, 0]
    assert [result.card["threshold"] for result in results] == [0.1, 0.5, 0.93, 1.1]
    assert (results[2].low, results[2].high) == wilson(2, 5) and results[2].n == 5


def test_regurgitated_drawings_are_found():
    """Of 60 drawings three are their training pictures, slightly changed, and one another's picture."""
    training, drawings = unit(60, 0, 64), unit(60, 1, 64)
    for row in (7, 30, 31):
        drawings[row] = training[row] + 0.01 * (row - 5) / 30 * unit(1, row, 64)[0]
    drawings[50] = training[12]
    found = neighbours.regurgitation(drawings, training, 0.9, pairs=4)
    assert [pair[:2] for pair in found.pairs[:3]] == [(7, 7), (30, 30), (31, 31)] and len(found.pairs) == 4
    every = drawings / np.linalg.norm(drawings, axis=1, keepdims=True) @ training.T
    own = np.diag(every)
    assert found.pairs[0].cosine == pytest.approx(own[7], abs=1e-6)
    other = np.where(np.eye(60, dtype=bool), -1, every).max(axis=1)
    expected = {"own": own, "other": other, "own_near": own >= 0.9, "other_near": other >= 0.9}
    expected["nearer_to_own"] = own > other
    assert found.results.keys() == expected.keys()
    for name, values in expected.items():
        assert found.results[name].value == pytest.approx(values.mean(), abs=1e-6), name
        assert found.results[name].n == 60 and found.results[name].low < found.results[name].high
    assert found.results["own_near"].value == 3 / 60 and found.results["other_near"].value == 1 / 60


def test_own_picture_may_be_any_row():
    training, rows = unit(30, 0), np.random.default_rng(1).permutation(30)[:8]
    found = neighbours.regurgitation(training[rows], training, 0.99, rows)
    assert found.results["own_near"].value == found.results["nearer_to_own"].value == 1
    assert [pair.training for pair in found.pairs] == [rows[pair.drawing] for pair in found.pairs]
    assert found.results["other"].high < 0.99


def test_copied_scene_is_found_by_its_pixels():
    """A picture of the test split that is in the training set, up to noise, is the one that is near."""
    scenes = {split: [scene for scene, _ in emoji_scenes.scenes("single", split)] for split in ("train", "test")}
    training = [emoji_scenes.render(scene, 32) for scene in scenes["train"][::40]]
    tested = [emoji_scenes.render(scene, 32) for scene in scenes["test"]]
    noise = np.random.default_rng(0).integers(-3, 4, tested[9].shape)
    training.insert(11, np.clip(tested[9].astype(int) + noise, 0, 255).astype(np.uint8))

    def embed(pictures):
        cells = np.stack(pictures).reshape(-1, 8, 4, 8, 4, 3).mean(axis=(2, 4)).reshape(len(pictures), -1)
        return cells - 128

    cosines, rows = neighbours.nearest(embed(tested), embed(training))
    kept = cosines[:, 0] < 0.9995
    assert np.flatnonzero(~kept).tolist() == [9] and rows[9, 0] == 11
    assert neighbours.near(cosines[:, 0], 0.9995).value == 1 / len(tested)


def test_what_cannot_be_compared_is_refused():
    training = unit(5, 0)
    for does, says in (
        (lambda: neighbours.regurgitation(unit(6, 1), training, 0.9), "each drawing's own row"),
        (lambda: neighbours.regurgitation(unit(2, 1), training, 0.9, np.array([0, 5])), "each drawing's own row"),
        (lambda: neighbours.regurgitation(training[:1], training[:1], 0.9), "1 training pictures: expected at least 2"),
        (lambda: neighbours.nearest(training * np.nan, training), "5 of 5 embeddings are zero or not finite"),
    ):
        with pytest.raises(UserError, match=says):
            does()
