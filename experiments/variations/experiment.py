"""Variations: pictures that share a CLIP embedding with a picture, and more or less of its noise."""

import numpy as np

from unclip_jax.cascade import Cascade
from unclip_jax.evaluation import factors
from unclip_jax.evaluation.factor_scores import likeness
from unclip_jax.evaluation.factor_values import every_factor, scene_values
from unclip_jax.trials import Arm, Claim, Experiment, Lab, Values

OWN, OTHER = "its own embedding", "another picture's"
DETAILS = ("size", "place", "rotation", "pattern", "word")


def measure(lab: Lab, cascade: Cascade, arm: Arm) -> Values:
    """Draws variations of each scene at eta = `arm.x`: "object", "tint", "colour", whether they are as in the scene;
    "details", the share of the `DETAILS` that are; "likeness", as of `factor_scores.likeness`."""
    draws = lab.experiment.draws
    z, x_T = lab.encoded(cascade, 25)
    z, x_T = (np.repeat(half, draws, axis=0) for half in (np.roll(z, 1, axis=0) if arm.series == OTHER else z, x_T))
    images = cascade.redraw(z, x_T, 0, eta=arm.x, steps=25)["images"][-1]
    found = scene_values(factors.read(images), lab.scenes, every_factor(lab.scenes))
    alike = likeness(images, lab.scenes).reshape(-1, draws)
    return found | {"details": np.mean([found[name] for name in DETAILS], axis=0), "likeness": alike}


ETAS = (0.0, 0.5, 1.0)

EXPERIMENT = Experiment(
    question="What do variations of a picture keep of it?",
    paper="unCLIP, section 3.1, figure 3",
    models=("clip", "decoder"),
    arms=(
        *(Arm(f"eta_{e:g}", f"eta {e:g}", x=e, series=OWN) for e in ETAS),
        Arm("other", "eta 1, another's embedding", x=1.0, series=OTHER),
    ),
    measures={
        "likeness": "likeness",
        "details": "details kept",
        "object": "object kept",
        "tint": "tint kept",
        "colour": "background kept",
    },
    claims=(
        Claim("At eta 0 the picture is reproduced, more than at eta 1.", "likeness", "eta_0", "eta_1"),
        Claim("At eta 1 details are lost.", "details", "eta_0", "eta_1"),
        Claim("The object is kept: it comes from the embedding.", "object", "eta_1", "other"),
        Claim("The background is kept: it comes from the embedding.", "colour", "eta_1", "other"),
    ),
    captions=256,
    draws=2,
    measure=measure,
    axis="eta",
)
