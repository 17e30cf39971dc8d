"""How many analytic steps the diffusion prior needs."""

from unclip_jax.trials import Arm, Claim, Experiment

STEPS = (4, 8, 16, 32, 64)

EXPERIMENT = Experiment(
    question="How many steps does the prior need?",
    paper="unCLIP, appendix C (64 steps of Analytic DPM)",
    models=("clip", "prior", "decoder"),
    arms=tuple(Arm(f"steps_{n}", f"{n} steps", sampling={"prior": {"steps": str(n)}}, x=n) for n in STEPS),
    measures={"named": "named factors right", "variety": "open factors that differ"},
    claims=(
        Claim("Sixteen steps are better than four.", "named", "steps_16", "steps_4"),
        Claim("64 steps are better than sixteen.", "named", "steps_64", "steps_16"),
    ),
    draws=1,
    axis="steps of the prior",
)
