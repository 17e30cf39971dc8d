"""SAM: a CLIP trained by sharpness-aware minimisation against one that is not."""

import numpy as np

from unclip_jax.cascade import Cascade
from unclip_jax.data import varied_scenes
from unclip_jax.evaluation.features import unit
from unclip_jax.stages.codes import principal_components
from unclip_jax.trials import Arm, Claim, Experiment, Lab, Values

TRAINING = 4096  # scenes in which the components are found
KEPT = 16  # principal components, of 128


def measure(lab: Lab, cascade: Cascade, arm: Arm) -> Values:
    """Embeds pictures of scenes and their captions. "held": the share of each embedding's variance that the first
    `KEPT` components hold; "found": whether a picture's own caption is the nearest of all."""
    known = [varied_scenes.render(varied_scenes.scene_at("train", i)[0], varied_scenes.FRAME) for i in range(TRAINING)]
    mean, components = principal_components([cascade.image_embeddings(known)])
    z = cascade.image_embeddings(lab.pictures())
    kept = np.square((z - mean) @ components[:KEPT].T).sum(axis=1) / np.square(z - mean).sum(axis=1)
    nearest = np.argmax(unit(z) @ unit(cascade.text_embeddings(list(lab.captions))).T, axis=1)
    return {"held": kept[:, None], "found": (nearest == np.arange(len(z)))[:, None].astype(np.float64)}


def arm(name: str, label: str, rho: float) -> Arm:
    return Arm(name, label, changes={"clip": {"optim.sam_rho": rho}})


EXPERIMENT = Experiment(
    question="Does SAM lower the rank of CLIP's embeddings, and does it cost accuracy?",
    paper="unCLIP, section 2.2 and appendix C",
    models=("clip",),
    arms=(arm("plain", "Adam", 0.0), arm("sam", "SAM", 0.1)),
    measures={"held": "variance in 16 components", "found": "own caption nearest"},
    claims=(
        Claim("SAM lowers the rank of the embeddings.", "held", "sam", "plain"),
        Claim("SAM improves accuracy a little.", "found", "sam", "plain"),
    ),
    captions=512,
    draws=1,
    seeds=3,
    short={"clip": {"train.steps": 400}},
    measure=measure,
)
