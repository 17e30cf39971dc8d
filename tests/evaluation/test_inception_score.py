"""Inception Score: closed forms, the arithmetic of guided-diffusion, splits."""

import numpy as np
import pytest
import scipy.special

from unclip_jax.errors import UserError
from unclip_jax.evaluation.inception_score import inception_score


def logits(n, seed=0, scale=2.0):
    return (scale * np.random.default_rng(seed).normal(size=(n, 30))).astype(np.float32)


def test_sure_and_varied_pictures_score_their_number_of_classes():
    sure = 1000.0 * np.eye(30, dtype=np.float32)[np.arange(600) % 6]
    assert inception_score(sure).value == pytest.approx(6, rel=1e-9)
    assert inception_score(np.zeros((50, 30), np.float32)).value == pytest.approx(1, rel=1e-12)


def test_it_is_guided_diffusions():
    values = logits(400)
    p = scipy.special.softmax(values.astype(np.float64), axis=1)
    parts = [p[i : i + 100] for i in range(0, 400, 100)]
    scores = [np.exp(np.mean(np.sum(q * (np.log(q) - np.log(q.mean(0)[None])), axis=1))) for q in parts]
    result = inception_score(values, split=100)
    assert result.value == pytest.approx(np.mean(scores), rel=1e-12) and result.n == 400
    assert result.card["splits"] == 4 and result.card["std"] == pytest.approx(np.std(scores), rel=1e-9)
    assert inception_score(logits(399), split=100).card["splits"] == 3  # none of 99
    assert inception_score(logits(99), split=100).card["splits"] == 1


@pytest.mark.parametrize("split", [100, 5000])
def test_interval_is_as_wide_as_draws_differ(split):
    results = [inception_score(logits(300, seed), split) for seed in range(100)]
    spread = np.std([result.value for result in results], ddof=1)
    said = np.sqrt(np.mean([((result.high - result.low) / 2 / 2.262157) ** 2 for result in results]))
    assert said == pytest.approx(spread, rel=0.25)


def test_too_few_are_refused():
    with pytest.raises(UserError, match="of 19 pictures: expected at least 20"):
        inception_score(logits(19))
