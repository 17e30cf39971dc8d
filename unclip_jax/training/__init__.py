"""Parts that every stage's training shares: optimizer, mesh, train state, checkpoints and metrics. Knows no stage."""
