"""Steps of the decoder's sampling: evenly spaced ones of DDIM and DDPM, and GLIDE's 27 by hand."""

from unclip_jax.trials import Arm, Claim, Experiment


def arm(sampler: str, steps: str, label: str) -> Arm:
    return Arm(f"{sampler}_{steps}", label, sampling={"decoder": {"sampler": sampler, "steps": steps}})


EXPERIMENT = Experiment(
    question="How many steps does the decoder need, of which sampler?",
    paper="GLIDE, section 4 (150 and 27 steps); unCLIP, appendix C (250 steps)",
    models=("clip", "prior", "decoder"),
    arms=(
        arm("ddim", "8", "DDIM, 8 steps"),
        arm("ddim", "25", "DDIM, 25 steps"),
        arm("ddim", "fast27", "DDIM, GLIDE's 27 steps"),
        arm("ddpm", "27", "DDPM, 27 steps"),
        arm("ddpm", "150", "DDPM, 150 steps"),
        arm("ddpm", "250", "DDPM, 250 steps"),
    ),
    measures={"named": "named factors right", "readable": "readable", "variety": "open factors that differ"},
    claims=(
        Claim("250 steps of DDPM draw better pictures than 27.", "named", "ddpm_250", "ddpm_27"),
        Claim("27 steps of DDPM are worse than as many of DDIM, spaced by hand.", "named", "ddim_fast27", "ddpm_27"),
    ),
)
