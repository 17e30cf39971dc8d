"""How many steps the diffusion prior needs, of which sampler."""

from unclip_jax.trials import Arm, Claim, Experiment

STEPS = {"analytic": (4, 8, 16, 64), "ddpm": (8, 16, 64), "ddim": (4, 8, 16), "dpm++": (4, 8, 16)}
LABELS = {"analytic": "Analytic-DPM", "ddpm": "DDPM", "ddim": "DDIM", "dpm++": "DPM-Solver++"}

EXPERIMENT = Experiment(
    question="How many steps does the prior need, of which sampler?",
    paper="unCLIP, appendix C (64 steps of Analytic-DPM)",
    models=("clip", "prior", "decoder"),
    arms=tuple(
        Arm(
            f"{sampler.replace('++', '')}_{n}",
            f"{LABELS[sampler]}, {n} steps",
            sampling={"prior": {"steps": str(n)} | ({} if sampler == "analytic" else {"sampler": sampler})},
            x=n,
            series=LABELS[sampler],
        )
        for sampler, counts in STEPS.items()
        for n in counts
    ),
    measures={"named": "named factors right", "all": "all of a caption right"},
    claims=(
        Claim("Sixteen analytic steps are better than four.", "named", "analytic_16", "analytic_4", ours=True),
        Claim("64 are better than sixteen.", "named", "analytic_64", "analytic_16", ours=True),
        Claim("Four analytic steps are better than four of DDIM.", "named", "analytic_4", "ddim_4"),
    ),
    captions=128,
    draws=1,
    axis="steps of the prior",
)
