"""Variations: pictures that share a CLIP embedding with a picture, and more or less of its noise."""

import numpy as np

from unclip_jax.cascade import Cascade
from unclip_jax.evaluation import factors
from unclip_jax.evaluation.factor_scores import likeness
from unclip_jax.evaluation.factor_values import every_factor, scene_values
from unclip_jax.trials import Arm, Claim, Experiment, Lab, Values


def measure(lab: Lab, cascade: Cascade, arm: Arm) -> Values:
    """Draws variations of each scene at eta = `arm.x`: "kept", the share of all factors that are as in the scene; each
    factor; "likeness", as of `factor_scores.likeness`."""
    draws = lab.experiment.draws
    z, x_T = (np.repeat(half, draws, axis=0) for half in lab.encoded(cascade, 25))
    images = cascade.redraw(z, x_T, 0, eta=arm.x, steps=25)["images"][-1]
    found = scene_values(factors.read(images), lab.scenes, every_factor(lab.scenes))
    alike = likeness(images, lab.scenes).reshape(-1, draws)
    return found | {"kept": found["named"], "likeness": alike}


ETAS = (0.0, 0.5, 1.0)

EXPERIMENT = Experiment(
    question="What do variations of a picture keep of it?",
    paper="unCLIP, section 3.1, figure 3",
    models=("clip", "decoder"),
    arms=tuple(Arm(f"eta_{e:g}", f"eta {e:g}", x=e) for e in ETAS),
    measures={"likeness": "likeness", "kept": "factors kept", "object": "object kept"},
    claims=(Claim("At eta 0 the picture is reproduced, more than at eta 1.", "likeness", "eta_0", "eta_1"),),
    captions=256,
    draws=2,
    measure=measure,
    axis="eta",
)
