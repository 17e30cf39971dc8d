"""Regurgitation: are pictures drawn for training captions copies of their training pictures?"""

import dataclasses
from collections.abc import Iterable

import numpy as np

from unclip_jax.cascade import Cascade
from unclip_jax.data import varied_scenes
from unclip_jax.evaluation.features import unit
from unclip_jax.evaluation.neighbours import nearest
from unclip_jax.trials import Arm, Claim, Experiment, Lab, Values

TRAINING = varied_scenes.COUNTS["train"]  # scenes that are searched
BLOCK = 2048  # of them are embedded at once
SEARCHED: dict[Lab, np.ndarray] = {}  # embeddings of all training pictures


def measure(lab: Lab, cascade: Cascade, arm: Arm) -> Values:
    """Compares a picture for each of the first training captions with the caption's training picture, by the CLIP.
    "own": the cosine to it, less that to another picture of the caption; "found": whether it is the nearest of all."""
    training = (varied_scenes.scene_at("train", index) for index in range(lab.experiment.captions))
    scenes, named, captions = zip(*training, strict=True)
    pairs = list(zip(scenes, named, strict=True))
    first, second = ([redrawn(scene, names, seed) for scene, names in pairs] for seed in (0, 1))
    if arm.name == "copies":
        pictures = [copy(picture) for picture in rendered(scenes)]
    elif arm.name == "drawn":
        pictures = list(cascade.generate(list(captions), 0)["images"][-1])
    else:
        pictures = rendered(second)
    z, own, other = (unit(cascade.image_embeddings(rows)) for rows in (pictures, rendered(scenes), rendered(first)))
    if lab not in SEARCHED:
        blocks = (range(start, min(start + BLOCK, TRAINING)) for start in range(0, TRAINING, BLOCK))
        known = (rendered([varied_scenes.scene_at("train", i)[0] for i in block]) for block in blocks)
        SEARCHED[lab] = np.concatenate([cascade.image_embeddings(block) for block in known])
    _, rows = nearest(z, SEARCHED[lab])
    nearer = np.sum(z * own, axis=1) - np.sum(z * other, axis=1)
    return {"own": nearer[:, None], "found": (rows == np.arange(len(z))[:, None]).astype(np.float64)}


def redrawn(scene: varied_scenes.Scene, named: tuple[str, ...], seed: int) -> varied_scenes.Scene:
    """Draws the factors of a scene anew that its caption leaves open."""
    rng = np.random.default_rng([seed, *map(ord, repr(scene))])
    left = {name: values for name, values in varied_scenes.factors().items() if name not in ("object", *named)}
    return dataclasses.replace(scene, **{name: values[rng.integers(len(values))] for name, values in left.items()})


def rendered(scenes: Iterable[varied_scenes.Scene]) -> list[np.ndarray]:
    return [varied_scenes.render(scene, varied_scenes.FRAME) for scene in scenes]


def copy(picture: np.ndarray) -> np.ndarray:
    """Makes a copy that is darker and shifted by a pixel."""
    return np.roll((picture * 0.9).astype(np.uint8), 1, axis=1)


EXPERIMENT = Experiment(
    question="Are pictures for training captions copies of their training pictures?",
    paper="GLIDE, section 6",
    models=("clip", "prior", "decoder"),
    arms=(
        Arm("copies", "copies of training pictures"),
        Arm("drawn", "drawn for training captions"),
        Arm("others", "new pictures of the same captions"),
    ),
    measures={"own": "nearer to the training picture", "found": "training picture is the nearest"},
    claims=(
        Claim("The search finds copies more often than new pictures.", "found", "copies", "others", ours=True),
        Claim("What is drawn is no copy: copies are nearer to the training picture.", "own", "copies", "drawn"),
    ),
    captions=512,
    draws=1,
    measure=measure,
)
