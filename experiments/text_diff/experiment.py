"""Pictures changed by the difference of two captions: does what was asked change, and does the rest stay?"""

import dataclasses

import jax
import numpy as np

from unclip_jax.cascade import Cascade, slerp
from unclip_jax.data import varied_scenes
from unclip_jax.evaluation import factors
from unclip_jax.evaluation.features import unit
from unclip_jax.trials import Arm, Claim, Experiment, Lab, Values

OTHER = "other noise"
CHANGED = ("colour", "tint", "object")  # by turns


def measure(lab: Lab, cascade: Cascade, arm: Arm) -> Values:
    """Changes a factor of each scene by captions that name object, tint and background. "changed": whether the picture
    shows its new value; "kept": the share of the other factors that are as they were."""
    pairs = [(scene, another(scene, CHANGED[i % len(CHANGED)])) for i, scene in enumerate(lab.scenes)]
    before, after = ([varied_scenes.caption(pair[k], ("tint", "colour")) for pair in pairs] for k in (0, 1))
    source, target = cascade.text_embeddings(before), cascade.text_embeddings(after)
    z, x_T = lab.encoded(cascade, 25)
    if arm.series == OTHER:
        x_T = np.asarray(jax.random.normal(jax.random.key(0), x_T.shape))
    directions = unit(target - source) * np.linalg.norm(z, axis=-1, keepdims=True)
    moved = np.stack([slerp(row, d, arm.x) for row, d in zip(z, directions, strict=True)]).astype(np.float32)
    shown = factors.read(cascade.redraw(moved, x_T, 0, steps=25, inverted=arm.series != OTHER)["images"][-1]).scenes
    changed, kept = [], []
    for i, (picture, pair) in enumerate(zip(shown, pairs, strict=True)):
        old, new = map(factors.as_read, pair)
        one = CHANGED[i % len(CHANGED)]
        changed.append(getattr(picture, one) == getattr(new, one))
        rest = [name for name in varied_scenes.factors() if name != one]
        kept.append(np.mean([getattr(picture, name) == getattr(old, name) for name in rest]))
    return {name: np.array(values, np.float64)[:, None] for name, values in (("changed", changed), ("kept", kept))}


def another(scene: varied_scenes.Scene, factor: str) -> varied_scenes.Scene:
    """Gives a factor of a scene the value that follows its own."""
    values = varied_scenes.factors()[factor]
    following = values[(values.index(getattr(scene, factor)) + 1) % len(values)]
    return dataclasses.replace(scene, **{factor: following})


SHARES = (0.0, 0.25, 0.5, 0.75)

EXPERIMENT = Experiment(
    question="Does a text difference change what it says, and leave the rest?",
    paper="unCLIP, section 3.3, figure 5",
    models=("clip", "decoder"),
    arms=(
        *(Arm(f"inverted_{s:g}", f"{s:g} of the way", x=s, series="the picture's x_T") for s in SHARES),
        *(Arm(f"fresh_{s:g}", f"{s:g} of the way, other noise", x=s, series=OTHER) for s in SHARES),
    ),
    measures={"changed": "asked change is there", "kept": "other factors kept"},
    claims=(
        Claim("Half of the way changes what was asked.", "changed", "inverted_0.5", "inverted_0"),
        Claim("Half of the way changes it more often than a quarter.", "changed", "inverted_0.5", "inverted_0.25"),
        Claim("The picture's own noise keeps the rest better than other noise.", "kept", "inverted_0.5", "fresh_0.5"),
    ),
    captions=128,
    draws=1,
    measure=measure,
    axis="share of the way to the text difference",
)
