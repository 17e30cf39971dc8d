"""Attribute binding and written words: unCLIP against GLIDE."""

from unclip_jax.trials import Arm, Claim, Experiment

EXPERIMENT = Experiment(
    question="Are two colours bound to the right things, and are words spelled?",
    paper="unCLIP, section 7, figures 14 to 16",
    models=("clip", "prior", "decoder"),
    arms=(
        Arm("unclip", "unCLIP", options={"guidance_scale": 2.0}),
        Arm("glide", "GLIDE", {"decoder": "glide"}, options={"guidance_scale": 2.0}),
    ),
    measures={"both": "both colours right", "binding": "colours not exchanged", "word": "word spelled"},
    claims=(
        Claim("GLIDE binds attributes better than unCLIP.", "both", "glide", "unclip"),
        Claim("GLIDE spells words better than unCLIP.", "word", "glide", "unclip", ours=True),
    ),
    draws=2,
)
