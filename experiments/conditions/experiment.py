"""Dropped and exchanged conditions: what the decoder takes from the caption, and what from the embedding."""

import numpy as np

from unclip_jax.cascade import Cascade
from unclip_jax.evaluation import factors
from unclip_jax.evaluation.factor_values import every_factor, scene_values
from unclip_jax.trials import Arm, Claim, Experiment, Lab, Values

GIVEN = {"own": "the scene's", "no": "no", "other": "another scene's"}


def measure(lab: Lab, cascade: Cascade, arm: Arm) -> Values:
    """Draws each scene from its caption, none, or the next scene's, and from the CLIP embedding of its picture, none,
    or the next scene's, as the arm's name says. "named": the share of the factors that the scene's caption names that
    is right; "left": of those that it leaves open, which the embedding alone can tell; "both" and "word", as of
    `scene_values`."""
    caption, embedding = arm.name.split("_")
    draws, count = lab.experiment.draws, len(lab.captions)
    z = cascade.image_embeddings(lab.pictures())
    texts = {"own": list(lab.captions), "no": [""] * count, "other": [*lab.captions[1:], lab.captions[0]]}[caption]
    chosen = {"own": z, "no": None, "other": np.roll(z, -1, axis=0)}[embedding]
    numbers = dict(rows=np.repeat(np.arange(count), draws), draws=np.tile(np.arange(draws), count))
    if chosen is None:
        numbers["source"] = "caption"
    else:
        numbers["embeddings"] = np.repeat(chosen, draws, axis=0)
    images = cascade.generate([text for text in texts for _ in range(draws)], 0, **numbers)["images"][-1]
    reading = factors.read(images)
    whole = scene_values(reading, lab.scenes, every_factor(lab.scenes))
    left = np.full((count, draws), np.nan)
    for row, names in enumerate(lab.named):
        hits = [whole[name][row] for name in every_factor(lab.scenes)[row] if name not in names]
        left[row] = np.mean(hits, axis=0) if hits else np.nan
    return scene_values(reading, lab.scenes, lab.named) | {"left": left}


EXPERIMENT = Experiment(
    question="What does the decoder take from the caption, and what from the embedding?",
    paper="unCLIP, section 2.1",
    models=("clip", "decoder"),
    arms=tuple(
        Arm(f"{caption}_{embedding}", f"{GIVEN[caption]} caption, {GIVEN[embedding]} embedding")
        for caption in GIVEN
        for embedding in GIVEN
    ),
    measures={"named": "named factors right", "left": "open factors right", "both": "both colours right",
              "word": "word right"},
    claims=(
        Claim("The embedding tells more of a scene than its caption.", "named", "no_own", "own_no"),
        Claim("Where the two contradict, the picture follows the embedding.", "named", "other_own", "own_other"),
        Claim("The caption helps beside the embedding.", "named", "own_own", "no_own"),
        Claim("It helps to bind two colours.", "both", "own_own", "no_own"),
        Claim("It helps to spell words.", "word", "own_own", "no_own", ours=True),
    ),
    draws=2,
    measure=measure,
)  # fmt: skip
