"""CLIP guidance against classifier-free guidance, by a noised CLIP and by one that saw no noise.

The noised CLIP has its gradient taken at x_t; the other, which does not know noise, at the predicted x0, led back to
x_t through the U-Net.
"""

import jax
import numpy as np

from unclip_jax.cascade import Cascade
from unclip_jax.evaluation import factors
from unclip_jax.evaluation.factor_values import scene_values
from unclip_jax.evaluation.features import unit
from unclip_jax.model import Model
from unclip_jax.pictures import to_float
from unclip_jax.trials import Arm, Claim, Experiment, Lab, Values

ROWS = 256  # pictures that are embedded at once
GUIDES = {"noised": "clip_noised", "clean": "clip"}  # CLIP → its config


def arm(kind: str, scale: float) -> Arm:
    """kind: "free", without a classifier, or the CLIP that guides."""
    if kind == "free":
        label, options = "classifier-free", {"guidance_scale": scale}
    else:
        label, options = f"{kind} CLIP", {"guidance_scale": 1.0, "clip_guidance_scale": scale}
    configs = {"decoder": "glide", "noised_clip": GUIDES.get(kind, "clip_noised")}
    return Arm(f"{kind}_{scale:g}", f"{label}, {scale:g}", configs, options=options, x=scale, series=label)


SCALES = {"free": (1, 2, 3, 5), "noised": (1, 2, 4), "clean": (2,)}  # the last is slow
ARMS = tuple(arm(kind, scale) for kind, scales in SCALES.items() for scale in scales)


def measure(lab: Lab, cascade: Cascade, arm: Arm) -> Values:
    """Draws the captions: what `scene_values` computes, and by each CLIP the cosine of picture and caption, in which
    one of them was the guide's aim."""
    images = lab.draw(cascade, arm)
    pictures = images.reshape(-1, *images.shape[2:])
    found = scene_values(factors.read(pictures), lab.scenes, lab.named)
    for name in GUIDES:
        guided = next(a for a in lab.experiment.arms if a.name.startswith(name))
        clip = Model.load(lab.bundle(lab.config(guided, "noised_clip")), ("clip",))
        z_t = np.repeat(unit(clip.embed_texts(list(lab.captions))), images.shape[1], axis=0)
        found[f"by_{name}"] = np.sum(embedded(clip, pictures) * z_t, axis=1).reshape(images.shape[:2])
    return found


def embedded(clip: Model, pictures: np.ndarray) -> np.ndarray:
    """Embeds pictures, (N, R, R, 3), as a noised CLIP sees them at the least noisy timestep, of unit norm."""
    embed = jax.jit(clip.stage.embed_noised)
    size, found = clip.stage.config.model.image_size, []
    for start in range(0, len(pictures), ROWS):
        rows = to_float(pictures[start : start + ROWS])
        rows = jax.image.resize(rows, (len(rows), size, size, 3), "linear")
        found.append(unit(np.asarray(embed(clip.params, rows, np.zeros(len(rows), np.int32)))))
    return np.concatenate(found)


EXPERIMENT = Experiment(
    question="Is classifier-free guidance better than guidance by a CLIP, and must that have seen noise?",
    paper="GLIDE, sections 5.1 and 5.2, appendix D, figures 6 and 10",
    models=("decoder", "noised_clip"),
    arms=ARMS,
    measures={"named": "named factors right", "by_noised": "cosine by the noised CLIP",
              "by_clean": "cosine by the clean CLIP", "variety": "open factors that differ"},
    claims=(
        Claim("Guidance without a classifier fits captions better than a noised CLIP's.", "named", "free_3",
              "noised_2"),
        Claim("A CLIP that guides is pleased more by what it guides.", "by_noised", "noised_2", "free_3"),
        Claim("An evaluating CLIP is pleased more, too.", "by_clean", "noised_2", "free_3"),
        Claim("A noised CLIP guides better than one that saw no noise.", "named", "noised_2", "clean_2"),
    ),
    captions=128,
    votes="named",
    draws=2,
    measure=measure,
    axis="guidance scale",
)  # fmt: skip
