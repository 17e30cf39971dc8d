"""Regurgitation: are drawn pictures copies of training pictures, and would copies be found?"""

from collections.abc import Iterator

import numpy as np

from unclip_jax.cascade import Cascade
from unclip_jax.data import varied_scenes
from unclip_jax.evaluation.neighbours import nearest
from unclip_jax.trials import Arm, Claim, Experiment, Lab, Values

TRAINING = varied_scenes.COUNTS["train"]  # scenes that are searched
BLOCK = 2048  # of them are embedded at once


def measure(lab: Lab, cascade: Cascade, arm: Arm) -> Values:
    """Finds the training picture that is nearest to each picture by the CLIP: "cosine" to it; "found", whether it is
    the one with the picture's number, of which the arm "copies" shows a copy."""
    many = lab.experiment.captions
    if arm.name == "copies":
        pictures = [copy(training_picture(index)) for index in range(many)]
    elif arm.name == "drawn":
        pictures = list(lab.draw(cascade, arm)[:, 0])
    else:
        pictures = lab.pictures()
    cosines, rows = nearest(cascade.image_embeddings(pictures), training_embeddings(cascade))
    return {"cosine": cosines, "found": (rows == np.arange(many)[:, None]).astype(np.float64)}


def training_picture(index: int) -> np.ndarray:
    return varied_scenes.render(varied_scenes.scene_at("train", index)[0], varied_scenes.FRAME)


def copy(picture: np.ndarray) -> np.ndarray:
    """Makes a copy that is darker and shifted by a pixel."""
    return np.roll((picture * 0.9).astype(np.uint8), 1, axis=1)


def training_embeddings(cascade: Cascade) -> Iterator[np.ndarray]:
    """Yields the embeddings of the training pictures, block by block."""
    for start in range(0, TRAINING, BLOCK):
        block = range(start, min(start + BLOCK, TRAINING))
        yield cascade.image_embeddings([training_picture(index) for index in block])


EXPERIMENT = Experiment(
    question="Are drawn pictures copies of training pictures?",
    paper="GLIDE, appendix F",
    models=("clip", "prior", "decoder"),
    arms=(
        Arm("copies", "copies of training pictures"),
        Arm("new", "pictures of new scenes"),
        Arm("drawn", "drawn pictures"),
    ),
    measures={"cosine": "cosine to the nearest", "found": "nearest is the picture's number"},
    claims=(
        Claim("A copy of a training picture is found.", "found", "copies", "new"),
        Claim("Copies are nearer to the training pictures than new pictures are.", "cosine", "copies", "new"),
        Claim("What is drawn is no copy: new pictures are nearer.", "cosine", "new", "drawn"),
    ),
    captions=512,
    draws=1,
    measure=measure,
)
