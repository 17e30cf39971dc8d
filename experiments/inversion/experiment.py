"""DDIM inversion: a picture's x_T, and what is drawn from it again."""

import numpy as np

from unclip_jax.cascade import Cascade
from unclip_jax.evaluation import factors
from unclip_jax.evaluation.factor_scores import likeness
from unclip_jax.evaluation.factor_values import every_factor, scene_values
from unclip_jax.trials import Arm, Claim, Experiment, Lab, Values


def measure(lab: Lab, cascade: Cascade, arm: Arm) -> Values:
    """Inverts each scene and draws it again, in `arm.x` steps each way: "likeness", 1 less the root mean squared
    difference in [-1, 1]; "kept", the share of factors that are as in the scene."""
    z, x_T = lab.encoded(cascade, int(arm.x))
    if arm.series == "next picture's embedding":
        z = np.roll(z, -1, axis=0)
    images = cascade.redraw(z, x_T, 0, steps=int(arm.x))["images"][-1]
    found = scene_values(factors.read(images), lab.scenes, every_factor(lab.scenes))
    return found | {"kept": found["named"], "likeness": likeness(images, lab.scenes)[:, None]}


STEPS = (10, 25, 50, 100)
SERIES = {"own": "own embedding", "next": "next picture's embedding"}

EXPERIMENT = Experiment(
    question="Do a picture's embedding and its x_T hold all of it?",
    paper="unCLIP, section 3 (the bipartite latent), by DDIM inversion",
    models=("clip", "decoder"),
    arms=tuple(
        Arm(f"{name}_{n}", f"{n} steps, {series}", x=n, series=series) for name, series in SERIES.items() for n in STEPS
    ),
    measures={"likeness": "likeness", "kept": "factors kept"},
    claims=(
        Claim("More steps reproduce the picture better.", "likeness", "own_100", "own_10", ours=True),
        Claim("A hundred steps are better than twenty-five.", "likeness", "own_100", "own_25", ours=True),
        Claim("x_T with another picture's embedding does not hold the picture.", "kept", "own_100", "next_100"),
    ),
    captions=128,
    draws=1,
    measure=measure,
    axis="steps each way",
)
