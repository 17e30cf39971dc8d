"""Guidance against size: a GLIDE of an eighth of the parameters that is guided, and the whole one that is not.

`NARROW` is for size "shipped": 289,947 of 2,362,827 parameters. Other sizes need other widths.
"""

from unclip_jax.trials import Arm, Claim, Experiment

NARROW = {
    "model.unet.channels": 8, "model.unet.head_channels": 8, "model.unet.norm_groups": 4, "model.text.width": 32,
    "model.text.heads": 1,
}  # fmt: skip
SCALES = 1.0, 3.0


def arms(name: str, label: str, changes: dict) -> list[Arm]:
    """One arm for each guidance scale."""
    return [
        Arm(f"{name}_{scale:g}", f"{label}, guidance {scale:g}", {"decoder": "glide"}, changes,
            options={"guidance_scale": scale})
        for scale in SCALES
    ]  # fmt: skip


EXPERIMENT = Experiment(
    question="Does guidance gain more than eight times the parameters?",
    paper="GLIDE, table 4",
    models=("decoder",),
    arms=(*arms("small", "an eighth", {"decoder": NARROW}), *arms("large", "whole", {})),
    measures={"named": "named factors right", "all": "all of a caption right", "readable": "readable"},
    claims=(
        Claim("The small model with guidance is better than the large one without.", "named", "small_3", "large_1"),
        Claim("Guidance helps the large one too.", "named", "large_3", "large_1"),
        Claim("Guided, the large one is better.", "named", "large_3", "small_3"),
    ),
    votes="named",
    draws=1,
)
