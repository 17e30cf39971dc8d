"""How many embeddings the prior should draw, of which the one nearest to the caption's text embedding is kept."""

from unclip_jax.trials import Arm, Claim, Experiment

EXPERIMENT = Experiment(
    question="Is it worth drawing several embeddings, to keep the one nearest to the caption?",
    paper="unCLIP, section 2.2 (two draws)",
    models=("clip", "prior", "decoder"),
    arms=tuple(
        Arm(f"draws_{n}", f"best of {n}" if n > 1 else "one draw", sampling={"prior": {"draws": n}}, x=n)
        for n in (1, 2, 4)
    ),
    measures={"named": "named factors right", "all": "all of a caption right", "variety": "open factors that differ"},
    claims=(
        Claim("Of two draws, the nearer to the text is better.", "named", "draws_2", "draws_1"),
        Claim("The best of four is better than that of two.", "named", "draws_4", "draws_2", ours=True),
        Claim("Choosing among draws costs diversity.", "variety", "draws_1", "draws_4", ours=True),
    ),
    captions=128,
    draws=2,
    axis="embeddings drawn",
)
