"""Filters of pictures: NumPy's decisions are scikit-learn's, the bias keeps its word, and scenes are filtered."""

import numpy as np
import pytest
from sklearn.svm import SVC

from unclip_jax.data import emoji_scenes, filtering
from unclip_jax.errors import UserError

CARD = {"network": "CLIP", "weights": "abc"}


def clouds(n, seed, d=8, apart=1.0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(n, d)).astype(np.float32) + side * apart / 2 for side in (1, -1)]


def test_decisions_are_scikit_learns(monkeypatch):
    monkeypatch.setattr(filtering, "CHUNK", 7)
    positives, negatives = clouds(60, 0)
    negatives = negatives[:40]
    rows = np.concatenate([positives, negatives]).astype(np.float64)
    gamma = 1 / np.mean([np.sum((row - rows.mean(axis=0)) ** 2) for row in rows])
    svm = SVC(kernel="rbf", gamma=gamma, class_weight="balanced").fit(rows, [1] * 60 + [0] * 40)
    found = filtering.fit(positives, negatives, CARD)
    new = np.concatenate(clouds(50, 1))
    np.testing.assert_allclose(found.scores(new, CARD), svm.decision_function(new), atol=1e-10)
    assert found.scores(new[:0], CARD).shape == (0,)


@pytest.mark.parametrize(("n", "rate", "missed"), [(1024, 0.01, 10), (200, 0.01, 1), (100, 0.01, 0), (40, 0.01, 0)])
def test_bias_misses_fewer_than_the_rate(n, rate, missed):
    """10 of 1,024 are 0.98 %, 1 of 200 is 0.5 %, 1 of 100 would be 1 %: not fewer."""
    held_out = clouds(n, 2)[0]
    found = filtering.fit(*clouds(60, 0), CARD).biased(held_out, rate)
    scores = found.scores(held_out, CARD)
    assert np.sum(scores < 0) == missed < rate * n
    assert scores[scores >= 0].min() == pytest.approx(0, abs=1e-5)  # no larger a bias than that needs


def test_bias_stays_where_nothing_is_missed():
    found = filtering.fit(*clouds(60, 0, apart=6.0), CARD)
    assert found.biased(clouds(40, 2, apart=6.0)[0], 0.01) == found


def test_bound_holds_for_pictures_that_chose_the_bias():
    """One-sided, 95 %: in 400 filters, biased by 60 positives each, the true rate is above the bound in 5 %.

    The filter's own part is fixed: its true rate at a bias is counted on 20,000 others.
    """
    bound = 1 - 0.05 ** (1 / 60)  # Clopper and Pearson's, for 0 of 60
    found, many = filtering.fit(*clouds(60, 0), CARD), clouds(20_000, 3)[0]
    scores, shift = found.scores(many, CARD), found.bias
    above = []
    for seed in range(400):
        biased = found.biased(clouds(60, 10 + seed)[0], 0.01)
        above.append(np.mean(scores + biased.bias - shift < 0) > bound)
    assert np.mean(above) == pytest.approx(0.05, abs=0.03)


def test_filter_is_stored_and_read(tmp_path):
    found = filtering.fit(*clouds(60, 0), CARD | {"seed": 3}).biased(clouds(20, 1)[0], 0.1)
    found.save(tmp_path / "filter.npz")
    back = filtering.Filter.load(tmp_path / "filter.npz")
    assert back.card == {"network": "CLIP", "weights": "abc", "seed": 3}
    new = np.concatenate(clouds(50, 1))
    np.testing.assert_array_equal(back.scores(new, CARD), found.scores(new, CARD))
    np.savez(tmp_path / "other.npz", vectors=np.array([{"a": 1}], dtype=object), allow_pickle=True)
    for name in ("other", "none"):
        with pytest.raises(UserError, match="no filter"):
            filtering.Filter.load(tmp_path / f"{name}.npz")


def test_boundary_comes_first():
    assert filtering.nearest_to_boundary(np.array([3.0, -0.1, 0.2, -5.0, 0.0]), 3).tolist() == [4, 1, 2]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("width", [672, 336, 224, 1344])
def test_crops_are_both_ends_and_the_middle(width, turned):
    """Of a picture whose columns are numbered, at its own size and at twice it."""
    ramp = np.linspace(0, 255, width).astype(np.uint8)
    height = 448 if width == 1344 else 224
    picture = np.repeat(np.broadcast_to(ramp, (height, width))[..., None], 3, axis=-1)
    found = filtering.crops(picture.swapaxes(0, 1) if turned else picture)
    assert found.shape == (3, 224, 224, 3) and found.dtype == np.uint8
    found = found.swapaxes(1, 2) if turned else found
    scale = height / 224
    slack = round(width / scale) - 224
    for crop, start in zip(found, (0, slack // 2, slack), strict=True):
        expected = np.interp((np.arange(start, start + 224) + 0.5) * scale - 0.5, np.arange(width), ramp)
        np.testing.assert_allclose(crop[100, :, 0], expected, atol=1.5)
        assert np.ptp(crop, axis=0).max() <= 1


def test_pooled_is_the_mean_of_each_pictures_crops():
    embeddings = np.random.default_rng(0).normal(size=(6, 4))
    np.testing.assert_allclose(filtering.pooled(embeddings), [embeddings[:3].mean(0), embeddings[3:].mean(0)])


def test_foxes_are_filtered_out_of_scenes():
    """Foxes among all other objects, on features as simple as pixels; fresh pictures are cut, moved and scaled anew."""
    rng = np.random.default_rng(0)
    others = [name for name in emoji_scenes.objects() if name != "fox"]
    colours = list(emoji_scenes.colours())

    def draw(fox, count):
        scenes = (
            emoji_scenes.Scene("fox" if fox else others[rng.integers(len(others))], colours[rng.integers(8)],
                               shift=tuple(rng.uniform(-0.03, 0.03, 2)), scale=(0.95, 1.0, 1.05)[rng.integers(3)])
            for _ in range(count)
        )  # fmt: skip
        pictures = np.stack([emoji_scenes.render(scene, 32) for scene in scenes])
        cells = pictures.reshape(count, 8, 4, 8, 4, 3).mean(axis=(2, 4)).reshape(count, -1)
        cells = cells - cells[:, :3].mean(axis=1, keepdims=True)
        return cells / np.linalg.norm(cells, axis=1, keepdims=True)

    found = filtering.fit(draw(True, 300), draw(False, 900), CARD).biased(draw(True, 300), 0.01)
    assert np.mean(found.scores(draw(True, 1024), CARD) < 0) < 0.01
    assert np.mean(found.scores(draw(False, 1024), CARD) >= 0) < 0.1


def test_what_cannot_be_filtered_is_refused():
    positives, negatives = clouds(20, 0)
    found = filtering.fit(positives, negatives, CARD)
    for does, says in (
        (lambda: found.scores(positives, {"weights": "xyz"}), "features of CLIP xyz, the filter is of abc"),
        (lambda: found.scores(positives[:, :2], CARD), r"expected \(n, 8\)"),
        (lambda: found.biased(positives[:0], 0.01), "0 pictures held out"),
        (lambda: found.biased(positives, 0.0), "rate 0.0"),
        (lambda: filtering.fit(positives[:0], negatives, CARD), "0 positives and 20 negatives"),
        (lambda: filtering.fit(positives * 0, negatives * 0, CARD), "all the same"),
    ):
        with pytest.raises(UserError, match=says):
            does()
