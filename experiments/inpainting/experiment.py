"""Inpainting by a GLIDE fine-tuned to see the known pixels, and by one that has them put back at every step."""

import numpy as np

from unclip_jax.cascade import Cascade
from unclip_jax.data.transforms import center_square
from unclip_jax.evaluation import factors
from unclip_jax.evaluation.factor_values import scene_values
from unclip_jax.trials import Arm, Claim, Experiment, Lab, Values

HOLE = 0.25, 0.75  # of the picture's side


def measure(lab: Lab, cascade: Cascade, arm: Arm) -> Values:
    """Erases the middle of each scene's picture, which is drawn anew for its caption. "named", as of `scene_values`;
    "seam": how far pixels on the two sides of the hole's edge differ more than in the picture itself, from 0 to 1;
    "error": the root mean squared difference from the picture inside the hole, on a scale of [-1, 1]."""
    size, draws = cascade.decoder.stage.config.model.image_size, lab.experiment.draws
    images, seams, errors = [], [], []
    for row, (picture, caption) in enumerate(zip(lab.pictures(), lab.captions, strict=True)):
        mask = hole(len(picture))
        options = {"rows": [row] * draws, "draws": range(draws), "implicit": arm.name == "implicit", **arm.options}
        drawn = cascade.inpaint(picture, mask, caption, draws, 0, **options)["images"][-1]
        true = center_square(picture, size, "area")
        seams.append([seam(image) - seam(true) for image in drawn])
        inside = hole(size)
        difference = (drawn[:, inside] - true[inside].astype(np.float64)) / 127.5
        errors.append(np.sqrt(np.mean(np.square(difference), axis=(1, 2))))
        images.append(drawn)
    found = scene_values(factors.read(np.concatenate(images)), lab.scenes, lab.named)
    return found | {"seam": np.array(seams), "error": np.array(errors)}


def hole(size: int) -> np.ndarray:
    """Marks the pixels that are drawn anew: bool (size, size)."""
    first, last = (round(share * size) for share in HOLE)
    mask = np.zeros((size, size), bool)
    mask[first:last, first:last] = True
    return mask


def seam(image: np.ndarray) -> float:
    """Computes the mean absolute difference, from 0 to 1, of neighbours one of which lies in the hole."""
    inside, pixels = hole(len(image)), image / 255.0
    down = np.abs(np.diff(pixels, axis=0))[inside[1:] != inside[:-1]]
    right = np.abs(np.diff(pixels, axis=1))[inside[:, 1:] != inside[:, :-1]]
    return float(np.concatenate([down, right]).mean())


EXPERIMENT = Experiment(
    question="Is a model that was trained to inpaint better than one that has known pixels put back?",
    paper="GLIDE, section 4.3, figures 2 and 3",
    models=("decoder",),
    arms=(
        Arm("implicit", "known pixels put back", {"decoder": "glide"}),
        Arm("trained", "trained to inpaint", {"decoder": "glide"}, {"decoder": {"model.inpaint": True}}),
    ),
    measures={"seam": "seam at the edge", "error": "error inside", "named": "named factors right"},
    claims=(
        Claim("Training leaves less of a seam.", "seam", "implicit", "trained"),
        Claim("What is drawn is nearer to what was erased.", "error", "implicit", "trained"),
        Claim("It fits captions better.", "named", "trained", "implicit"),
    ),
    captions=128,
    draws=2,
    short={"decoder": {"init.bundle": "shipped:glide", "train.steps": 750, "optim.learning_rate": 0.0005}},
    measure=measure,
)
