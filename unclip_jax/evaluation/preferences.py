"""Preferences of people between pictures: win rates as unCLIP reports them, and Elo scores as GLIDE does.

A comparison shows a picture of one arm beside one of another, and people vote for the left or the right one, for a tie,
or that they are not sure. A tie is half a win for each arm (GLIDE, arXiv 2112.10741, appendix A.1); "not sure" (unCLIP,
arXiv 2204.06125, section 5.2) is counted and left out.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from unclip_jax.errors import UserError
from unclip_jax.evaluation.intervals import DRAWS, SHARE, Result, Z, wilson

WINS = {"left": 1.0, "right": 0.0, "tie": 0.5}  # vote → wins of the left arm
NOT_SURE = "not sure"
VOTES = (*WINS, NOT_SURE)
PER_FACTOR = 400 / np.log(10)  # Elo points for e times the odds
STEPS, TOLERANCE = 200, 1e-10  # of Newton's method, the latter in logits


class Vote(NamedTuple):
    """A vote of one person in one comparison."""

    comparison: int
    left: str  # arms
    right: str
    vote: str  # one of VOTES


def win_rates(votes: Sequence[Vote], arms: Sequence[str]) -> list[Result]:
    """Computes how often each arm won over each later one, for pairs with votes other than "not sure".

    A tie is half a win. The interval is Wilson's; the card has unCLIP's "normal", the half width 1.96 √(p (1 - p) / n),
    and the numbers of ties and of "not sure".
    """
    found = []
    for i, one in enumerate(arms):
        for other in arms[i + 1 :]:
            both = [vote for vote in votes if {vote.left, vote.right} == {one, other}]
            sure = [vote for vote in both if vote.vote != NOT_SURE]
            if not sure:
                continue
            wins = sum(WINS[vote.vote] if vote.left == one else 1 - WINS[vote.vote] for vote in sure)
            share, n = wins / len(sure), len(sure)
            ties = sum(vote.vote == "tie" for vote in sure)
            card = {"interval": "Wilson", "normal": normal(share, n), "ties": ties, NOT_SURE: len(both) - n}
            found.append(Result(f"win rate of {one} over {other}", share, *wilson(wins, n), n, card))
    return found


def normal(share: float, n: int) -> float:
    """Returns half the width of the normal interval of a share, as unCLIP's table 1 has it."""
    return float(Z * np.sqrt(share * (1 - share) / n))


def chance(difference: float) -> float:
    """Returns the win rate, from 0 to 1, that a difference of Elo scores stands for: 1 / (1 + 10^(-d / 400))."""
    return float(1 / (1 + 10 ** (-difference / 400)))


def elo_scores(votes: Sequence[Vote], arms: Sequence[str], seed: int = 0, draws: int = DRAWS) -> list[Result]:
    """Computes the Elo score of each arm, with an interval by a bootstrap over comparisons.

    All votes of one comparison are drawn together. In a sample where some arm never lost to the rest, scores are
    infinite: the card counts such samples, which are left out, or leave no interval, (-inf, inf), where they are more
    than 2.5 %. Raises UserError as `elo` does.
    """
    sure = [vote for vote in votes if vote.vote != NOT_SURE]
    place = {arm: i for i, arm in enumerate(arms)}
    row = {comparison: i for i, comparison in enumerate(dict.fromkeys(vote.comparison for vote in sure))}
    wins = np.zeros((len(row), len(arms), len(arms)))
    for vote in sure:
        left, right = place[vote.left], place[vote.right]
        wins[row[vote.comparison], left, right] += WINS[vote.vote]
        wins[row[vote.comparison], right, left] += 1 - WINS[vote.vote]
    scores = elo(wins.sum(0), arms)

    rng = np.random.default_rng(seed)
    share = np.full(len(row), 1 / len(row))
    sampled = np.stack([np.tensordot(rng.multinomial(len(row), share), wins, 1) for _ in range(draws)])
    finite = _beaten(sampled).all((1, 2))
    low, high = np.full((2, len(arms)), [[-np.inf], [np.inf]])
    if 1 - finite.mean() <= (1 - SHARE) / 2:
        low, high = np.quantile(_newton(sampled[finite]), [(1 - SHARE) / 2, (1 + SHARE) / 2], axis=0)
    card = {"interval": "bootstrap over comparisons", "draws": draws, "seed": seed, "comparisons": len(row)}
    card |= {"infinite draws": int((~finite).sum()), "mean of all scores": 0}
    rows = zip(arms, scores, low, high, strict=True)
    return [Result(f"Elo of {arm}", *map(float, numbers), len(sure), card) for arm, *numbers in rows]


def elo(wins: np.ndarray, arms: Sequence[str]) -> np.ndarray:
    """Computes Elo scores (K,), whose mean is 0, from wins (K, K), where A_ij counts the wins of arm i over arm j.

    They minimise -Σ_ij A_ij log P(i ≻ j), P(i ≻ j) = 1 / (1 + 10^((s_j - s_i) / 400)): Bradley and Terry's model on the
    scale of chess. GLIDE's appendix prints the exponent with the other sign, by which the worst arm would score best,
    unlike in its tables. Only differences are defined. Raises UserError where they are infinite.
    """
    beaten = _beaten(wins)
    if not beaten.all():
        above = min(beaten.T, key=np.sum)  # arms of which the others never beat one
        better, rest = (", ".join(arms[i] for i in np.flatnonzero(side)) for side in (above, ~above))
        if wins[above][:, ~above].any():
            raise UserError(f"no Elo scores: {better} never lost to {rest}, and would be infinitely better")
        raise UserError(f"no Elo scores: nobody compared {better} with {rest}")
    return _newton(wins)


def _beaten(wins: np.ndarray) -> np.ndarray:
    """Tells which arms (..., K) beat which (..., K), directly or through others; each counts as beating itself.

    Scores are finite where all is true, that is where the graph of wins is strongly connected (Ford, 1957).
    """
    count = wins.shape[-1]
    reached = (wins > 0) | np.eye(count, dtype=bool)
    for _ in range(count.bit_length()):
        reached = (reached.astype(np.float64) @ reached) > 0
    return reached


def _newton(wins: np.ndarray) -> np.ndarray:
    """Finds the scores (..., K) of strongly connected wins (..., K, K) by Newton's method from 0.

    A step d is shortened by log(1 + r) / r, r its range, with which it never overshoots: the loss is self-concordant in
    the generalised sense (Sun and Tran-Dinh, arXiv 1703.04599, with ν = 2).
    """
    games = wins + np.swapaxes(wins, -1, -2)
    logits = np.zeros(wins.shape[:-1])
    for _ in range(STEPS):
        chances = 1 / (1 + np.exp(logits[..., None, :] - logits[..., :, None]))
        gradient = (wins - games * chances).sum(-1)
        curvature = games * chances * (1 - chances)
        laplacian = curvature.sum(-1)[..., None] * np.eye(wins.shape[-1]) - curvature
        step = np.linalg.solve(laplacian + 1, gradient[..., None])[..., 0]  # + 1: the mean stays 0
        reach = np.ptp(step, axis=-1, keepdims=True)
        logits += step * np.log1p(reach) / np.maximum(reach, np.finfo(float).tiny)
        if reach.max() < TOLERANCE:
            break
    return logits * PER_FACTOR
