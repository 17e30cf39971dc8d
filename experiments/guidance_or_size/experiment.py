"""Guidance against size: a GLIDE of an eighth of the parameters that is guided, and the whole one that is not.

Both learn scenes of one object, of which captions are learned within minutes. `WHOLE` and `NARROW` are for size
"shipped": 2,362,827 and 289,947 parameters. Other sizes need other widths.
"""

import numpy as np

from unclip_jax.cascade import Cascade
from unclip_jax.data import emoji_scenes
from unclip_jax.evaluation.alignment import classify
from unclip_jax.trials import Arm, Claim, Experiment, Lab, Values

WHOLE = {"data.source": "tfds:emoji_scenes/single_64", "data.weights": (), "model.unet.channels": 24}
NARROW = WHOLE | {
    "model.unet.channels": 8, "model.unet.head_channels": 8, "model.unet.norm_groups": 4, "model.text.width": 32,
    "model.text.heads": 1,
}  # fmt: skip
SCALES = 1.0, 3.0


def measure(lab: Lab, cascade: Cascade, arm: Arm) -> Values:
    """Draws the held-out captions of one object: whether object, background and both are right, read from pixels."""
    scenes, captions = zip(*list(emoji_scenes.scenes("single", "test"))[: lab.experiment.captions], strict=True)
    asked = np.array([(scene.object, scene.colour) for scene in scenes])
    right = []
    for number in range(lab.experiment.draws):
        drawn = cascade.generate(list(captions), 0, draws=[number] * len(captions), **arm.options)["images"][-1]
        right.append(np.stack(classify(drawn), axis=1) == asked)
    found = np.stack(right, axis=1).astype(np.float64)  # (captions, draws, object and background)
    return {"object": found[..., 0], "background": found[..., 1], "both": found.all(axis=-1).astype(np.float64)}


def arms(name: str, label: str, changes: dict) -> list[Arm]:
    """One arm for each guidance scale."""
    return [
        Arm(f"{name}_{scale:g}", f"{label}, guidance {scale:g}", {"decoder": "glide"}, {"decoder": changes},
            options={"guidance_scale": scale})
        for scale in SCALES
    ]  # fmt: skip


EXPERIMENT = Experiment(
    question="Does guidance gain more than eight times the parameters?",
    paper="GLIDE, table 4",
    models=("decoder",),
    arms=(*arms("small", "an eighth", NARROW), *arms("large", "whole", WHOLE)),
    measures={"both": "object and background right", "object": "object right", "background": "background right"},
    claims=(
        Claim("The small model with guidance is better than the large one without.", "both", "small_3", "large_1"),
        Claim("Guidance helps the large one too.", "both", "large_3", "large_1"),
        Claim("Guided, the large one is better.", "both", "large_3", "small_3"),
    ),
    captions=64,
    votes="both",
    draws=8,
    short={"decoder": {"model.image_size": 16, "optim.learning_rate": 0.003, "train.steps": 5000}},
    measure=measure,
)
