"""Win rates against unCLIP's published intervals, and Elo scores against closed forms and GLIDE's tables."""

import numpy as np
import pytest

from unclip_jax.errors import UserError
from unclip_jax.evaluation.intervals import wilson
from unclip_jax.evaluation.preferences import NOT_SURE, Vote, chance, elo, elo_scores, normal, win_rates


def votes_of(counts, left="a", right="b"):
    """Votes by their counts, each in a comparison of its own."""
    words = [vote for vote, count in counts.items() for _ in range(count)]
    return [Vote(i, left, right, vote) for i, vote in enumerate(words)]


@pytest.mark.parametrize(
    ("share", "half"), [(47.1, 3.1), (41.1, 3.0), (62.6, 3.0), (48.9, 3.1), (45.3, 3.0), (70.5, 2.8)]
)
def test_unclips_intervals_are_the_normal_ones(share, half):
    """Its table 1, to the digit that it has; of 45.3 % it gives ± 3.0, where n = 1000 makes ± 3.085."""
    assert 100 * normal(share / 100, 1000) == pytest.approx(half, abs=0.05 if share != 45.3 else 0.09)


def test_a_tie_is_half_a_win_and_not_sure_is_left_out():
    counts = {"left": 30, "right": 20, "tie": 10, NOT_SURE: 7}
    mirrored = {"left": 20, "right": 30, "tie": 10, NOT_SURE: 7}
    for votes in (votes_of(counts), votes_of(mirrored, "b", "a")):
        (result,) = win_rates(votes, ["a", "b"])
        assert result.name == "win rate of a over b" and result.value == 35 / 60 and result.n == 60
        assert (result.low, result.high) == wilson(35, 60)
        assert result.card["ties"] == 10 and result.card["not sure"] == 7
        assert result.card["normal"] == pytest.approx(1.959964 * np.sqrt(35 * 25 / 60**3), abs=1e-9)


def test_pairs_without_votes_have_no_win_rate():
    votes = [*votes_of({"left": 1}), *votes_of({NOT_SURE: 3}, "b", "c")]
    assert [result.name for result in win_rates(votes, ["a", "b", "c"])] == ["win rate of a over b"]


def test_two_arms_differ_by_the_log_of_their_odds():
    for wins, losses in ((3, 1), (355, 645), (1, 1), (99_999, 1)):
        scores = elo(np.array([[0, wins], [losses, 0]], float), "ab")
        assert scores[0] - scores[1] == pytest.approx(400 * np.log10(wins / losses), abs=1e-6)
        assert scores.sum() == pytest.approx(0, abs=1e-6)
        assert chance(scores[0] - scores[1]) == pytest.approx(wins / (wins + losses))


def test_elo_is_found_again_from_the_wins_it_implies():
    """GLIDE's table 4, photorealism: with wins in proportion to its chances, the loss is least at its scores."""
    table = np.array([-131.8, 28.2, -23.9, 133.0])
    wins = np.array([[1000 * chance(one - other) * (one != other) for other in table] for one in table])
    np.testing.assert_allclose(elo(wins, "abcd"), table - table.mean(), atol=1e-6)


def test_glides_table_implies_these_win_rates():
    """Classifier-free over CLIP guidance in its table 1: more than half, photorealism 71 %, captions 62 %."""
    assert chance(82.7 - -73.2) == pytest.approx(0.710, abs=5e-4)
    assert chance(110.9 - 29.3) == pytest.approx(0.615, abs=5e-4)
    assert chance(-73.2 - 82.7) == pytest.approx(1 - 0.710, abs=5e-4)


def test_elo_is_the_least_loss_of_a_grid():
    """Within a point of the best of a grid of two points' distance, over three arms, two of which never met."""
    wins = np.array([[0, 7.5, 0], [2.5, 0, 4], [0, 1, 0]])
    first, last = np.meshgrid(np.arange(-500, 500, 2.0), np.arange(-500, 500, 2.0))  # the second arm's score is 0
    differences = {(0, 1): first, (1, 0): -first, (1, 2): -last, (2, 1): last}
    loss = sum(wins[pair] * np.log10(1 + 10 ** (-difference / 400)) for pair, difference in differences.items())
    best = first.flat[loss.argmin()], last.flat[loss.argmin()]
    scores = elo(wins, "abc")
    np.testing.assert_allclose(scores[[0, 2]] - scores[1], best, atol=1.01)


@pytest.mark.parametrize(
    ("wins", "says"),
    [
        ([[0, 5], [0, 0]], "a never lost to b"),
        ([[0, 0, 0], [1, 0, 2], [3, 1, 0]], "b, c never lost to a"),
        ([[0, 1, 0], [1, 0, 0], [0, 0, 0]], "nobody compared c with a, b"),
    ],
)
def test_infinite_scores_are_refused(wins, says):
    with pytest.raises(UserError, match=says):
        elo(np.array(wins, float), "abc"[: len(wins)])


def test_a_single_tie_makes_scores_finite():
    scores = elo(np.array([[0, 5.5], [0.5, 0]]), "ab")
    assert scores[0] - scores[1] == pytest.approx(400 * np.log10(11))


def test_elos_interval_is_as_wide_as_the_delta_method_says():
    """With two arms 400 log10(p / (1 - p)) has the standard error 400 / ln 10 / √(n p (1 - p)); a score half."""
    results = elo_scores(votes_of({"left": 700, "right": 300}), ["a", "b"])
    half = 1.96 * 400 / np.log(10) / np.sqrt(1000 * 0.7 * 0.3) / 2
    for result in results:
        assert (result.high - result.low) / 2 == pytest.approx(half, rel=0.05)
        assert result.low < result.value < result.high and result.n == 1000
    assert results == elo_scores(votes_of({"left": 700, "right": 300}), ["a", "b"])
    assert results != elo_scores(votes_of({"left": 700, "right": 300}), ["a", "b"], seed=1)


def test_votes_of_several_people_on_one_comparison_are_one_draw():
    """Four people who always agree say no more than one: the interval stays as wide."""
    once = votes_of({"left": 140, "right": 60})
    (one, _), (four, _) = (elo_scores(votes, ["a", "b"]) for votes in (once, 4 * once))
    assert four.n == 4 * one.n and four.card["comparisons"] == one.card["comparisons"] == 200
    assert (four.low, four.value, four.high) == pytest.approx((one.low, one.value, one.high))


def test_samples_with_infinite_scores_are_counted():
    """With one loss in 20, a sample of 20 has none with the chance (19/20)^20 = 0.36: there is no upper end."""
    first, last = elo_scores(votes_of({"left": 19, "right": 1}), ["a", "b"])
    assert first.card["infinite draws"] / 2000 == pytest.approx(0.36, abs=0.03)
    assert (first.low, first.high) == (last.low, last.high) == (-np.inf, np.inf)
    few, _ = elo_scores(votes_of({"left": 95, "right": 5}), ["a", "b"])  # (19/20)^100 = 0.006
    assert 0 < few.card["infinite draws"] < 30 and np.isfinite([few.low, few.high]).all()
