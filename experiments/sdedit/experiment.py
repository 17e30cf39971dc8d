"""SDEdit: drawings that start from a noised sketch and follow another caption."""

import numpy as np

from unclip_jax.cascade import Cascade
from unclip_jax.evaluation import factors
from unclip_jax.evaluation.factor_scores import likeness
from unclip_jax.evaluation.factor_values import scene_values
from unclip_jax.trials import Arm, Claim, Experiment, Lab, Values


def measure(lab: Lab, cascade: Cascade, arm: Arm) -> Values:
    """Draws each caption over the next scene, noised for `arm.x` of the chain: "named", the share of what the caption
    names that is right; "likeness" to the sketch, 1 less the root mean squared difference in [-1, 1]."""
    draws = lab.experiment.draws
    sketches = np.roll(np.stack(lab.pictures()), -1, axis=0)
    captions = [caption for caption in lab.captions for _ in range(draws)]
    images = cascade.sdedit(np.repeat(sketches, draws, axis=0), captions, arm.x, seed=0)["images"][-1]
    found = scene_values(factors.read(images), lab.scenes, lab.named)
    sketched = [*lab.scenes[1:], lab.scenes[0]]
    return found | {"likeness": likeness(images, sketched).reshape(-1, draws)}


DDIM = {"sampler": "ddim", "steps": "25"}
STARTS = (0.3, 0.5, 0.7, 0.9)

EXPERIMENT = Experiment(
    question="How far must a sketch be noised for a caption to be followed?",
    paper="GLIDE, figure 4 (SDEdit)",
    models=("clip", "prior", "decoder"),
    arms=tuple(
        Arm(f"start_{share:g}", f"noised for {share:g} of the chain", sampling={"decoder": DDIM}, x=share)
        for share in STARTS
    ),
    measures={"named": "named factors right", "likeness": "likeness to the sketch"},
    claims=(
        Claim("More noise lets the caption be followed.", "named", "start_0.9", "start_0.3"),
        Claim("Less noise keeps the sketch.", "likeness", "start_0.3", "start_0.9"),
    ),
    captions=128,
    draws=4,
    measure=measure,
    axis="share of the chain",
)
