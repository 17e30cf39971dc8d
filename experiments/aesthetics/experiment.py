"""Aesthetics against variety: what guidance makes neater, and what it costs, in unCLIP and in GLIDE."""

import numpy as np

from unclip_jax.cascade import Cascade
from unclip_jax.evaluation import factors
from unclip_jax.evaluation.factor_scores import tells
from unclip_jax.evaluation.factor_values import scene_values
from unclip_jax.trials import Arm, Claim, Experiment, Lab, Values

NEAT = {"rotation": "upright", "place": "centre", "pattern": "plain"}


def measure(lab: Lab, cascade: Cascade, arm: Arm) -> Values:
    """Draws the captions. "neat": of the factors in `NEAT` that a caption leaves open and a picture shows readably, the
    share that is neat; "variety", as of `scene_values`."""
    images = lab.draw(cascade, arm)
    reading = factors.read(images.reshape(-1, *images.shape[2:]))
    shows = {name: reading.shows(name) for name in NEAT}
    neat = np.full(images.shape[:2], np.nan)
    for row, names in enumerate(lab.named):
        left = [name for name in NEAT if name not in names]
        for k in range(images.shape[1]):
            at = row * images.shape[1] + k
            shown = reading.scenes[at]
            told = [name for name in left if shows[name][at] and tells(shown.object, name)]
            neat[row, k] = np.mean([getattr(shown, name) == NEAT[name] for name in told]) if told else np.nan
    return scene_values(reading, lab.scenes, lab.named) | {"neat": neat}


SCALES = (1.0, 2.0, 4.0)
MODELS = {"unclip": ("unCLIP", {}), "glide": ("GLIDE", {"decoder": "glide"})}

EXPERIMENT = Experiment(
    question="Does guidance make pictures neater, and less varied?",
    paper="unCLIP, section 5.5, figure 13",
    models=("clip", "prior", "decoder"),
    arms=tuple(
        Arm(
            f"{name}_{scale:g}",
            f"{label}, {scale:g}",
            configs,
            options={"guidance_scale": scale},
            x=scale,
            series=label,
        )
        for name, (label, configs) in MODELS.items()
        for scale in SCALES
    ),
    measures={"neat": "open factors that are neat", "variety": "open factors that differ"},
    claims=(
        Claim("Guidance makes GLIDE's pictures neater.", "neat", "glide_4", "glide_1"),
        Claim("Guidance makes unCLIP's pictures neater.", "neat", "unclip_4", "unclip_1"),
        Claim("Guided GLIDE loses variety.", "variety", "glide_1", "glide_4"),
        Claim("Guided unCLIP is more varied than guided GLIDE.", "variety", "unclip_4", "glide_4"),
    ),
    draws=2,
    measure=measure,
    axis="guidance scale",
)
