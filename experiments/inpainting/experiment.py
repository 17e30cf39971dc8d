"""Inpainting by a GLIDE fine-tuned to see the known pixels, and by one that has them put back at every step."""

import numpy as np

from unclip_jax.cascade import Cascade, scaled_mask
from unclip_jax.data import varied_scenes
from unclip_jax.data.transforms import center_square
from unclip_jax.data.varied_scenes import FRAME, Scene
from unclip_jax.evaluation import factors
from unclip_jax.evaluation.factor_values import scene_values
from unclip_jax.trials import Arm, Claim, Experiment, Lab, Values

GLIDE = {"decoder": "glide"}
HIDDEN = ("tint", "size", "rotation")  # besides the object: factors that nothing outside the hole tells


def measure(lab: Lab, cascade: Cascade, arm: Arm) -> Values:
    """Erases the object of each scene's picture, and draws the hole anew for its caption. "hidden": the share that is
    right of what the caption names among the object and `HIDDEN`; "seam": how far pixels on the two sides of the hole's
    edge differ more than in the picture itself, from 0 to 1; "error": the root mean squared difference from the picture
    inside the hole, on a scale of [-1, 1]."""
    size, draws = cascade.decoder.stage.config.model.image_size, lab.experiment.draws
    options = {"draws": range(draws), "implicit": not cascade.decoder.stage.config.model.inpaint}
    images, seams, errors = [], [], []
    for row, (scene, picture, caption) in enumerate(zip(lab.scenes, lab.pictures(), lab.captions, strict=True)):
        mask = hole(scene)
        drawn = cascade.inpaint(picture, mask, caption, draws, 0, rows=[row] * draws, **options)["images"][-1]
        true, inside = center_square(picture, size, "area"), scaled_mask(mask, size)
        seams.append([seam(image, inside) - seam(true, inside) for image in drawn])
        difference = (drawn[:, inside] - true[inside].astype(np.float64)) / 127.5
        errors.append(np.sqrt(np.mean(np.square(difference), axis=(1, 2))))
        images.append(drawn)
    named = [tuple(name for name in names if name in HIDDEN) for names in lab.named]
    found = scene_values(factors.read(np.concatenate(images)), lab.scenes, named)
    return {"hidden": found["named"], "seam": np.array(seams), "error": np.array(errors)}


def hole(scene: Scene) -> np.ndarray:
    """Marks the square that holds a scene's drawing: bool (64, 64)."""
    left, top, right, bottom = varied_scenes.box(scene.size, scene.place)
    mask = np.zeros((FRAME, FRAME), bool)
    mask[max(top, 0) : bottom, max(left, 0) : right] = True
    return mask


def seam(image: np.ndarray, inside: np.ndarray) -> float:
    """Computes the mean absolute difference, from 0 to 1, of neighbours one of which lies in the hole."""
    pixels = image / 255.0
    down = np.abs(np.diff(pixels, axis=0))[inside[1:] != inside[:-1]]
    right = np.abs(np.diff(pixels, axis=1))[inside[:, 1:] != inside[:, :-1]]
    return float(np.concatenate([down, right]).mean())


EXPERIMENT = Experiment(
    question="Is a model that was trained to inpaint better than one that has known pixels put back?",
    paper="GLIDE, section 4.3, figures 2 and 3",
    models=("decoder",),
    arms=(
        Arm("implicit", "known pixels put back", GLIDE),
        Arm("onward", "the same, trained as long as the next", GLIDE, {"decoder": {"model.inpaint": False}}),
        Arm("trained", "trained to inpaint", GLIDE, {"decoder": {"model.inpaint": True}}),
    ),
    measures={"seam": "seam at the edge", "error": "error inside", "hidden": "right of what was erased"},
    claims=(
        Claim("Training to inpaint leaves less of a seam.", "seam", "onward", "trained"),
        Claim("What is drawn is nearer to what was erased.", "error", "onward", "trained"),
        Claim("It shows more of what the caption asks for in the hole.", "hidden", "trained", "onward"),
    ),
    captions=128,
    draws=2,
    short={"decoder": {"init.bundle": "shipped:glide", "train.steps": 750, "optim.learning_rate": 0.0005}},
    measure=measure,
)
