"""Diversity and the Vendi score: closed forms, plain loops, and how wide their intervals are."""

import numpy as np
import pytest

from unclip_jax.errors import UserError
from unclip_jax.evaluation.diversity import diversity, vendi, vendi_score


def rows(n, d, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d))


def test_diversity_is_a_loop_over_pairs_and_captions():
    pictures = rows(13, 5).astype(np.float32)
    captions = np.array(["a"] * 3 + ["b"] * 8 + ["c"] * 2)[np.random.default_rng(1).permutation(13)]
    expected = []
    for caption in "abc":
        own = [row / np.linalg.norm(row) for row in pictures[captions == caption]]
        pairs = [1 - a @ b for i, a in enumerate(own) for b in own[i + 1 :]]
        expected.append(np.mean(pairs))
    result = diversity(pictures, captions)
    assert result.value == pytest.approx(np.mean(expected), abs=1e-6)
    assert result.n == 3 and result.low < result.value < result.high
    assert result.card["pictures"] == 13 and result.card["pictures_a_caption"] == [2, 8]


def test_diversity_of_equal_orthogonal_and_opposite_pictures():
    captions = np.repeat([0, 1], 2)
    for second, expected in (([2, 0], 0), ([0, 7], 1), ([-1, 0], 2)):
        pictures = np.array([[1.0, 0], second] * 2)
        assert diversity(pictures, captions).value == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("n", [20, 35])
def test_vendi_of_equal_and_of_orthogonal_pictures(n):
    equal = vendi_score(np.tile(rows(1, 6), (n, 1)))
    assert equal.value == pytest.approx(1, abs=1e-9) and equal.low == pytest.approx(1) == equal.high
    assert vendi_score(3 * np.eye(n, 40)).value == pytest.approx(n, rel=1e-12)
    groups = np.repeat(np.eye(5), n // 5, axis=0)  # five different pictures, each as often
    assert vendi(groups) == pytest.approx(5, rel=1e-12)


@pytest.mark.parametrize("shape", [(30, 8), (30, 64)])
def test_vendi_is_the_entropy_of_the_kernels_eigenvalues(shape):
    pictures = rows(*shape)
    pictures /= np.linalg.norm(pictures, axis=1, keepdims=True)
    values = np.linalg.eigvals(pictures @ pictures.T / len(pictures)).real
    values = values[values > 1e-12]
    assert vendi_score(pictures).value == pytest.approx(np.exp(-np.sum(values * np.log(values))), rel=1e-9)


def test_vendi_of_two_pictures_is_the_closed_form():
    """Eigenvalues (1 ± c) / 2 for two pictures of cosine c."""
    c = 0.3
    p, q = (1 + c) / 2, (1 - c) / 2
    assert vendi(np.array([[1, 0], [c, np.sqrt(1 - c**2)]])) == pytest.approx(np.exp(-p * np.log(p) - q * np.log(q)))


def test_vendis_intervals_are_as_wide_as_draws_differ():
    """A hundred sets of pictures drawn anew; Student's with 9 degrees of freedom is 2.26 errors to either side."""
    scales, shift = [3, 2, 1, 1, 0.5, 0.5], [1, 0, 0, 0, 0, 0]
    results = [vendi_score(rows(400, 6, seed) * scales + shift) for seed in range(100)]
    spread = np.std([result.value for result in results], ddof=1)
    error = np.mean([result.high - result.low for result in results]) / 2 / 2.262
    assert error == pytest.approx(spread, rel=0.25)


def test_what_cannot_be_measured_is_refused():
    pictures = rows(4, 3)
    for does, says in (
        (lambda: diversity(pictures, np.array([0, 0, 0])), "a caption for each"),
        (lambda: diversity(pictures, np.array([0, 0, 0, 0])), "of 1 captions"),
        (lambda: diversity(pictures, np.array(["a", "a", "a", "b"])), "of which 1 have one picture"),
        (lambda: diversity(pictures * 0, np.array([0, 0, 1, 1])), "4 of 4 embeddings are zero or not finite"),
        (lambda: vendi_score(pictures), "Vendi score of 4 pictures: expected at least 20"),
    ):
        with pytest.raises(UserError, match=says):
            does()
