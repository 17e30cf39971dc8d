"""FID, KID and CMMD against closed forms, other arithmetic and repeated draws; moments, and their files."""

import functools
import operator

import numpy as np
import pytest
import scipy.linalg

from unclip_jax.errors import UserError
from unclip_jax.evaluation import frechet
from unclip_jax.evaluation.frechet import Statistics, cmmd, fid, frechet_distance, grouped_statistics, kid, statistics

CARD = {"weights": "abc", "features": "pool", "source": "noise"}


def rows(n, d, seed=0, shift=0.0, scale=1.0):
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(d).normal(size=(d, d)) / np.sqrt(d)
    return ((scale * rng.normal(size=(n, d)) + shift) @ mixing).astype(np.float32)


def in_batches(values, size):
    return (values[i : i + size] for i in range(0, len(values), size))


def of_moments(mean, covariance, n=1000):
    return Statistics(n, np.array(mean, float), np.array(covariance, float) * (n - 1), CARD)


def test_distance_of_gaussians_with_known_moments():
    """Where covariances commute, it is |Δμ|² + Σ (σ - σ')²."""
    rotation = scipy.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0]
    one, other = np.array([1, 4, 9, 0.25, 0]), np.array([4, 1, 16, 1, 0.01])
    means = np.arange(5), np.ones(5)
    expected = np.square(means[0] - means[1]).sum() + np.square(np.sqrt(one) - np.sqrt(other)).sum()
    moments = [of_moments(m, rotation * v @ rotation.T) for m, v in zip(means, (one, other), strict=True)]
    # One covariance is singular: a zero that is rounded to 1e-15 has a root of 3e-8.
    assert frechet_distance(*moments) == pytest.approx(expected, rel=1e-7)
    assert frechet_distance(*moments[::-1]) == pytest.approx(expected, rel=1e-7)


def test_distance_is_guided_diffusions():
    """Whose product of covariances is not symmetric, and whose covariances are NumPy's."""
    a, b = rows(300, 12, 1), rows(200, 12, 2, 0.3, 1.5)
    step = a.mean(0, np.float64) - b.mean(0, np.float64)
    covariances = [np.cov(x.astype(np.float64), rowvar=False) for x in (a, b)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = step @ step + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert frechet_distance(statistics([a], CARD), statistics([b], CARD)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("n", [500, 30])
def test_distance_of_a_set_to_itself_is_zero(n):
    """Also of fewer rows than numbers in a row."""
    moments = statistics([rows(n, 60)], CARD)
    assert abs(frechet_distance(moments, moments)) < 1e-6 * np.trace(moments.covariance)


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_moments_are_numpys_for_every_batch_size(size, monkeypatch):
    monkeypatch.setattr(frechet, "CHUNK", 16)
    values = rows(333, 6, shift=40.0)  # far from zero, where sums of squares lose digits
    found = statistics(in_batches(values, size), CARD)
    assert found.n == 333
    np.testing.assert_allclose(found.mean, values.mean(0, np.float64), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(values.astype(np.float64), rowvar=False), rtol=1e-9, atol=1e-9)
    whole = statistics([values], CARD)
    assert np.array_equal(found.mean, whole.mean) and np.array_equal(found.scatter, whole.scatter)

    groups = grouped_statistics(in_batches(values, size), 4, CARD)
    for g, part in enumerate(groups):
        np.testing.assert_allclose(part.mean, values[g::4].mean(0, np.float64), rtol=1e-12)
    others = functools.reduce(operator.add, groups).without(groups[2])
    kept = np.delete(values.astype(np.float64), np.s_[2::4], axis=0)
    assert others.n == len(kept)
    np.testing.assert_allclose(others.covariance, np.cov(kept, rowvar=False), rtol=1e-9, atol=1e-9)


def test_fid_comes_with_its_interval_and_card():
    reference = statistics([rows(900, 8, 1)], CARD | {"source": "truth"})
    pictures = rows(400, 8, 2, 0.2)
    result = fid(grouped_statistics([pictures], 10, CARD), reference)
    assert result.value == pytest.approx(frechet_distance(statistics([pictures], CARD), reference), rel=1e-9)
    assert result.name == "FID" and result.n == 400 and result.low < result.value < result.high
    spatial = CARD | {"features": "spatial"}
    assert fid(grouped_statistics([pictures], 10, spatial), statistics([pictures], spatial)).name == "sFID"
    assert result.card["pictures"] == CARD and result.card["reference"] == CARD | {"source": "truth", "n": 900}


@pytest.mark.parametrize(
    "measure",
    [
        lambda x, y: fid(grouped_statistics([x], 10, CARD), statistics([y], CARD)),
        cmmd,
        lambda x, y: kid(x, y, blocks=10),
    ],
    ids=["fid", "cmmd", "kid"],
)
def test_intervals_are_as_wide_as_draws_differ(measure):
    """A hundred sets of pictures from one model: the spread of the number, and what each set says of it by itself."""
    reference = rows(600, 6, 1)
    results = [measure(rows(500, 6, 10 + i, 0.4, 1.3), reference) for i in range(100)]
    spread = np.std([result.value for result in results], ddof=1)
    said = np.sqrt(np.mean([((result.high - result.low) / 2 / 2.262157) ** 2 for result in results]))
    assert said == pytest.approx(spread, rel=0.25)


def test_kid_by_hand():
    x, y = rows(4, 3, 1).astype(np.float64), rows(6, 3, 2).astype(np.float64)

    def k(a, b):
        return (a @ b / 3 + 1) ** 3

    expected = 0.0
    for block in range(2):
        a, b = x[block::2], y[block::2]
        pairs = [[k(p, q) for i, p in enumerate(s) for j, q in enumerate(s) if i != j] for s in (a, b)]
        expected += (np.mean(pairs[0]) + np.mean(pairs[1]) - 2 * np.mean([k(p, q) for p in a for q in b])) / 2
    result = kid(x, y, blocks=2)
    assert result.value == pytest.approx(expected, rel=1e-12) and result.n == 4
    assert result.card["blocks"] == 2


def test_kid_of_equal_distributions_is_zero_within_its_error():
    result = kid(rows(3000, 16, 1), rows(3000, 16, 2))
    assert result.low < 0 < result.high and result.card["blocks"] == 10
    moved = kid(rows(3000, 16, 1), rows(3000, 16, 2, shift=0.2))
    assert moved.low > 0
    assert kid(rows(12_000, 2, 1), rows(11_500, 2, 2)).card["blocks"] == 12


def test_cmmd_by_hand():
    x, y = rows(25, 4, 1).astype(np.float64), rows(30, 4, 2, 0.5).astype(np.float64)
    x, y = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x, y))

    def mean(a, b):
        return np.mean([np.exp(-np.square(p - q).sum() / 200) for p in a for q in b])

    result = cmmd(3 * x, y)
    assert result.value == pytest.approx(1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y)), rel=1e-9)
    assert abs(cmmd(x, x).value) < 1e-9


def test_statistics_come_back_from_their_file(tmp_path):
    card = CARD | {"crop": "center", "resize": "area, 256"}
    moments = statistics([rows(50, 5)], card)
    moments.save(tmp_path / "reference.npz")
    back = Statistics.load(tmp_path / "reference.npz")
    assert (back.n, back.card) == (50, card)
    np.testing.assert_array_equal(back.mean, moments.mean)
    np.testing.assert_allclose(back.scatter, moments.scatter, rtol=1e-14)
    with np.load(tmp_path / "reference.npz") as file:
        np.testing.assert_array_equal(file["covariance"], moments.covariance)

    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "reference.npz").read_bytes()[:300])
    np.savez(tmp_path / "other.npz", mu=moments.mean)
    for name in ("text", "cut", "other"):
        with pytest.raises(UserError, match=f"{name}.npz holds no statistics"):
            Statistics.load(tmp_path / f"{name}.npz")
    with pytest.raises(UserError, match="no such file"):
        Statistics.load(tmp_path / "nowhere.npz")


def test_statistics_that_do_not_say_what_they_are_of_are_not_stored(tmp_path):
    with pytest.raises(UserError, match="does not say crop, resize"):
        statistics([rows(50, 5)], CARD).save(tmp_path / "reference.npz")
    assert not any(tmp_path.iterdir())


def test_what_cannot_be_measured_is_refused():
    few = rows(15, 4)
    reference, groups = statistics([few], CARD | {"weights": "other"}), grouped_statistics([few], 5, CARD)
    for does, says in (
        (lambda: statistics([few[:1]], CARD), "1 pictures: expected at least 2"),
        (lambda: statistics([], CARD), "0 pictures"),
        (lambda: grouped_statistics([few], 10, CARD), "15 pictures: expected at least 20"),
        (lambda: fid(groups, reference), "weights of the pictures abc, of the reference other"),
        (lambda: kid(few, few), "KID of 15 pictures in 10 blocks"),
        (lambda: cmmd(few, few), "CMMD of 15"),
        (lambda: statistics([few, few[:, :2]], CARD), "bring all to one size"),
    ):
        with pytest.raises(UserError, match=says):
            does()
