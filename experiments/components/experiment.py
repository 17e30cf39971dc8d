"""Pictures from the first principal components of their CLIP embeddings."""

import jax
import numpy as np

from unclip_jax.cascade import Cascade
from unclip_jax.data import varied_scenes
from unclip_jax.evaluation import factors
from unclip_jax.evaluation.features import unit
from unclip_jax.stages.codes import principal_components
from unclip_jax.trials import Arm, Claim, Experiment, Lab, Values, every_factor, scene_values

COUNTS = (2, 4, 8, 16, 32, 64, 128)
TRAINING = 4096  # scenes in which the components are found
DETAILS = ("rotation", "pattern", "word")


def measure(lab: Lab, cascade: Cascade, arm: Arm) -> Values:
    """Draws each scene again from `arm.x` components of its embedding. "before": whether the object is right, less the
    share of details that are."""
    known = [varied_scenes.render(varied_scenes.scene_at("train", index)[0], 64) for index in range(TRAINING)]
    mean, components = principal_components([cascade.image_embeddings(known)])
    kept = components[: int(arm.x)]
    z = np.repeat(cascade.image_embeddings(lab.pictures()), lab.experiment.draws, axis=0)
    z = unit(mean + (z - mean) @ kept.T @ kept).astype(np.float32)
    size = cascade.decoder.stage.config.model.image_size
    noise = jax.random.normal(jax.random.key(0), (len(z), size, size, 3))
    images = cascade.redraw(z, np.asarray(noise), 0, steps=25, inverted=False)["images"][-1]
    found = scene_values(factors.read(images), lab.scenes, every_factor(lab.scenes))
    return found | {"before": found["object"] - np.mean([found[name] for name in DETAILS], axis=0)}


EXPERIMENT = Experiment(
    question="What do the first principal components of a CLIP embedding hold?",
    paper="unCLIP, section 4.2, figure 7",
    models=("clip", "decoder"),
    arms=tuple(Arm(f"first_{n}", f"{n} components", x=n) for n in COUNTS),
    measures={"object": "object", "colour": "background", "word": "word", "before": "object before details"},
    claims=(
        Claim("The first components hold what a picture shows, the later ones its details.", "before", "first_16",
              "first_128"),
        Claim("Objects need more than the first few components.", "object", "first_128", "first_4"),
        Claim("All components show more details than half of them.", "word", "first_128", "first_64"),
    ),
    captions=512,
    draws=1,
    measure=measure,
    axis="components",
)  # fmt: skip
