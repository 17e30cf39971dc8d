"""Guidance: pictures that fit their captions better, and differ less, with unCLIP and with GLIDE."""

from unclip_jax.trials import Arm, Claim, Experiment

SCALES = (1.0, 2.0, 4.0)
GLIDE = {"decoder": "glide"}

EXPERIMENT = Experiment(
    question="What does guidance gain in alignment, and cost in diversity?",
    paper="unCLIP, sections 5.2 and 5.3, figures 9 to 11; GLIDE, figure 6",
    models=("clip", "prior", "decoder"),
    arms=(
        *(Arm(f"unclip_{s:g}", f"unCLIP, {s:g}", options={"guidance_scale": s}, x=s, series="unCLIP") for s in SCALES),
        *(
            Arm(f"glide_{s:g}", f"GLIDE, {s:g}", GLIDE, options={"guidance_scale": s}, x=s, series="GLIDE")
            for s in SCALES
        ),
    ),
    measures={"named": "named factors right", "readable": "readable", "variety": "open factors that differ"},
    claims=(
        Claim("Guidance makes GLIDE's pictures fit their captions better.", "named", "glide_4", "glide_1"),
        Claim("It costs GLIDE diversity.", "variety", "glide_1", "glide_4"),
        Claim("unCLIP is more varied than GLIDE at the same scale.", "variety", "unclip_4", "glide_4"),
        Claim("GLIDE fits captions better than unCLIP, both guided.", "named", "glide_4", "unclip_4"),
    ),
    draws=2,
    axis="guidance scale",
)
