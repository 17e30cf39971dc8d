import numpy as np
import pytest

from unclip_jax.evaluation.comparisons import difference, mean


def width(result):
    return result.high - result.low


def test_independent_rows_have_the_interval_of_a_mean():
    values = np.random.default_rng(0).normal(size=(1, 400, 1))
    found = mean("height", values)
    assert (found.name, found.n) == ("height", 400)
    assert found.card == {"training_seeds": 1, "captions": 400, "draws": 1}
    assert found.value == pytest.approx(values.mean())
    assert width(found) == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


def test_pictures_of_a_caption_are_not_independent():
    """Four equal pictures of each caption say no more than one of them."""
    one = np.random.default_rng(1).normal(size=(1, 200, 1))
    assert width(mean("", one.repeat(4, axis=2))) == pytest.approx(width(mean("", one)), rel=0.1)
    independent = np.random.default_rng(1).normal(size=(1, 200, 4))
    assert width(mean("", independent)) < 0.8 * width(mean("", one))


def test_pictures_of_one_trained_model_are_not_independent():
    """Models that differ by 0 and 1 in all captions: their mean is not known to a hundredth."""
    values = np.repeat([[[0.0]], [[1.0]], [[0.0]], [[1.0]]], 300, axis=1)
    assert width(mean("", values)) > 0.5


def test_training_seeds_share_their_captions():
    """A caption that is hard for one model is hard for all: more models do not make captions more."""
    hard = np.random.default_rng(2).normal(size=(1, 100, 1))
    assert width(mean("", hard.repeat(5, axis=0))) == pytest.approx(width(mean("", hard)), rel=0.15)


def test_arms_are_compared_on_the_same_captions():
    captions = np.random.default_rng(3).normal(size=(1, 100, 1))
    noise = np.random.default_rng(4).normal(scale=0.01, size=(2, 1, 100, 2))
    better, worse = captions + 0.02 + noise[0], captions + noise[1]
    found = difference("", better, worse)
    assert 0.01 < found.low < 0.02 < found.high < 0.03
    assert difference("", worse, better).high < 0
    assert width(found) < 0.05 * width(mean("", better))


def test_values_that_are_not_there_do_not_count():
    values = np.array([[[1.0, np.nan], [0.0, np.nan], [np.nan, np.nan]]])
    found = mean("", values)
    assert (found.value, found.n) == (0.5, 2)
    assert difference("", values, np.zeros((1, 3, 2))).n == 2
    nothing = mean("", np.full((1, 2, 2), np.nan))
    assert np.isnan(nothing.value) and nothing.n == 0


def test_arms_of_other_captions_are_refused():
    with pytest.raises(ValueError, match="same seeds and captions"):
        difference("", np.zeros((1, 3, 2)), np.zeros((1, 4, 2)))


def test_one_trained_model_is_compared_with_several():
    captions = np.random.default_rng(5).normal(size=(1, 200, 1))
    found = difference("", np.concatenate([captions + gap for gap in (0.4, 0.5, 0.6)]), captions)
    assert found.value == pytest.approx(0.5) and found.n == 200
    assert 0.3 < found.low < 0.5 < found.high < 0.7, "the same captions, so that the models alone differ"
