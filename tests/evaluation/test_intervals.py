"""Intervals against closed forms, and counted: how often they hold what they are of."""

import numpy as np
import pytest

from unclip_jax.evaluation.intervals import Result, bootstrap, jackknife, wilson


def test_wilson_solves_its_equation():
    """Its ends are the shares p from which hits/n is 1.96 standard deviations of p away."""
    for hits, n in ((3, 10), (999, 1000), (40, 64), (1, 2)):
        for end in wilson(hits, n):
            assert abs(hits / n - end) == pytest.approx(1.959964 * np.sqrt(end * (1 - end) / n), abs=1e-9)
    assert wilson(0, 64)[0] == 0 and wilson(0, 64)[1] == pytest.approx(0.0566, abs=1e-4)
    assert wilson(64, 64)[1] == 1 and wilson(64, 64)[0] == pytest.approx(1 - 0.0566, abs=1e-4)


def test_bootstrap_of_a_mean_is_the_normal_interval():
    values = np.random.default_rng(0).exponential(size=2000)
    low, high = bootstrap(values)
    error = values.std() / np.sqrt(len(values))
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)
    assert bootstrap(values) == (low, high) != bootstrap(values, seed=1)


def test_jackknife_of_a_mean_is_students_interval_of_group_means():
    groups = np.random.default_rng(0).normal(size=(10, 30))
    whole = groups.mean()
    without = [(groups.sum() - group.sum()) / (9 * 30) for group in groups]
    low, high = jackknife(whole, without)
    half = 2.262157 * groups.mean(axis=1).std(ddof=1) / np.sqrt(10)
    assert (low, high) == (pytest.approx(whole - half, abs=1e-6), pytest.approx(whole + half, abs=1e-6))


def test_a_result_says_its_n_and_interval():
    result = Result("FID", 12.2449, 12.01, 12.47, 30_000, {"interval": "jackknife"})
    assert str(result) == "FID 12.24 [12.01, 12.47], n = 30,000"
    noted = result.noting(steps=250)
    assert noted.card == {"interval": "jackknife", "steps": 250} and result.card == {"interval": "jackknife"}
