"""Pictures from the first principal components of their CLIP embeddings."""

import jax
import numpy as np

from unclip_jax.cascade import Cascade
from unclip_jax.data import varied_scenes
from unclip_jax.evaluation import factors
from unclip_jax.evaluation.factor_values import every_factor, scene_values
from unclip_jax.evaluation.features import unit
from unclip_jax.stages.codes import principal_components
from unclip_jax.trials import Arm, Claim, Experiment, Lab, Values

COUNTS = (2, 4, 8, 16, 32, 64, 128)
TRAINING = 4096  # scenes in which the components are found
SUBSTANCE = ("object", "tint", "colour")
DETAILS = ("size", "place", "rotation", "pattern", "word")
WHOLE: dict[Lab, Values] = {}  # what is right in pictures of all components


def measure(lab: Lab, cascade: Cascade, arm: Arm) -> Values:
    """Draws each scene again from `arm.x` components of its embedding. "before": of what is right in a picture of all
    components, the share of the substance that still is, less that of the details."""
    known = [varied_scenes.render(varied_scenes.scene_at("train", index)[0], 64) for index in range(TRAINING)]
    mean, components = principal_components([cascade.image_embeddings(known)])
    kept = components[: int(arm.x)]
    z = cascade.image_embeddings(lab.pictures())
    size = cascade.decoder.stage.config.model.image_size
    noise = np.asarray(jax.random.normal(jax.random.key(0), (len(z), size, size, 3)))

    def right(z: np.ndarray) -> Values:
        images = cascade.redraw(z.astype(np.float32), noise, 0, steps=25, inverted=False)["images"][-1]
        return scene_values(factors.read(images), lab.scenes, every_factor(lab.scenes))

    if lab not in WHOLE:
        WHOLE[lab] = right(z)
    found = right(unit(mean + (z - mean) @ kept.T @ kept))
    still = {name: np.where(whole == 1, found[name], np.nan) for name, whole in WHOLE[lab].items()}
    return found | {"before": share([still[n] for n in SUBSTANCE]) - share([still[n] for n in DETAILS])}


def share(hits: list[np.ndarray]) -> np.ndarray:
    """Means over factors, leaving out NaN; NaN where all are."""
    known = np.isfinite(hits).sum(axis=0)
    return np.where(known, np.nansum(hits, axis=0) / np.maximum(known, 1), np.nan)


EXPERIMENT = Experiment(
    question="What do the first principal components of a CLIP embedding hold?",
    paper="unCLIP, section 4, figure 7",
    models=("clip", "decoder"),
    arms=tuple(Arm(f"first_{n}", f"{n} components", x=n) for n in COUNTS),
    measures={"object": "object", "colour": "background", "word": "word", "before": "substance before details"},
    claims=(
        Claim("The first components hold what a picture shows, the later ones its details.", "before", "first_16",
              "first_128"),
        Claim("Objects need more than the first few components.", "object", "first_128", "first_4"),
        Claim("All components show more details than half of them.", "word", "first_128", "first_64"),
    ),
    captions=128,
    draws=1,
    measure=measure,
    axis="components",
)  # fmt: skip
