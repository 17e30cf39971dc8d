"""Elo scores against choix, which fits Bradley and Terry's model in natural units."""

import numpy as np
import pytest

choix = pytest.importorskip("choix")

from unclip_jax.evaluation.preferences import elo

SCALE = 400 / np.log(10)  # Elo points to a natural unit


@pytest.mark.parametrize("arms", [2, 3, 4, 8])
@pytest.mark.parametrize("fit", ["ilsr_pairwise", "opt_pairwise"])
def test_elo_is_choixs_on_its_scale(arms, fit, seen):
    rng = np.random.default_rng(arms)
    truth = rng.normal(size=arms)
    pairs = rng.permuted(np.tile(np.arange(arms), (2000, 1)), axis=1)[:, :2]
    first_wins = rng.random(2000) < 1 / (1 + np.exp(truth[pairs[:, 1]] - truth[pairs[:, 0]]))
    ordered = np.where(first_wins[:, None], pairs, pairs[:, ::-1])  # winner, loser
    wins = np.zeros((arms, arms))
    np.add.at(wins, tuple(ordered.T), 1)
    exact = {"tol": 1e-10, "max_iter": 10_000} if fit == "ilsr_pairwise" else {"tol": 1e-12}
    theirs = getattr(choix, fit)(arms, ordered.tolist(), **exact)
    ours, theirs = elo(wins, "abcdefgh"[:arms]), SCALE * (theirs - theirs.mean())
    seen(f"Elo against choix.{fit}", np.abs(ours - theirs).max() / np.abs(theirs).max())
    np.testing.assert_allclose(ours, theirs, atol=1e-6 if fit == "ilsr_pairwise" else 1e-2)
