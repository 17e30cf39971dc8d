"""Interpolation: pictures on the way from one to another, with and without the noise of both."""

import jax
import numpy as np

from unclip_jax.cascade import Cascade, slerp
from unclip_jax.data import varied_scenes
from unclip_jax.evaluation import factors
from unclip_jax.trials import Arm, Claim, Experiment, Lab, Values


def measure(lab: Lab, cascade: Cascade, arm: Arm) -> Values:
    """Draws the picture `arm.x` of the way from each scene to the next one. Of the factors in which the two differ:
    "first", the share that is as in the first scene; "second", as in the second; "either", as in one of them."""
    z, x_T = lab.encoded(cascade, 25)
    noise = x_T
    if arm.series == "one draw of noise":
        noise = np.repeat(jax.random.normal(jax.random.key(0), x_T[:1].shape), len(x_T), axis=0)
    pairs = list(zip(range(len(z)), [*range(1, len(z)), 0], strict=True))
    rows = np.stack([slerp(z[i], z[j], arm.x) for i, j in pairs]).astype(np.float32)
    noise = np.stack([slerp(noise[i], noise[j], arm.x) for i, j in pairs]).astype(np.float32)
    images = cascade.redraw(rows, noise, 0, steps=25, inverted=arm.series != "one draw of noise")["images"][-1]
    found: dict[str, list[float]] = {"first": [], "second": [], "either": []}
    scenes = list(map(factors.as_read, lab.scenes))
    for (i, j), shown in zip(pairs, factors.read(images).scenes, strict=True):
        differ = [name for name in varied_scenes.factors() if getattr(scenes[i], name) != getattr(scenes[j], name)]
        as_in = [[getattr(shown, name) == getattr(scenes[k], name) for name in differ] for k in (i, j)]
        for name, hits in zip(found, (as_in[0], as_in[1], np.any(as_in, axis=0)), strict=True):
            found[name].append(np.mean(hits))
    return {name: np.array(values)[:, None] for name, values in found.items()}


SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
SERIES = {"both": "embedding and x_T", "one": "one draw of noise"}

EXPERIMENT = Experiment(
    question="Do pictures between two pictures blend what the two show?",
    paper="unCLIP, section 3.2, figure 4",
    models=("clip", "decoder"),
    arms=tuple(
        Arm(f"{name}_{share:g}", f"{share:g} of the way, {series}", x=share, series=series)
        for name, series in SERIES.items()
        for share in SHARES
    ),
    measures={"first": "as in the first", "second": "as in the second", "either": "as in one of them"},
    claims=(
        Claim("On the way from a picture, less and less is left of it.", "first", "both_0.25", "both_0.75"),
        Claim("On the way to a picture, more and more is there of it.", "second", "both_0.75", "both_0.25"),
        Claim("Halfway there is something of both: more of the second than at the start.", "second", "both_0.5",
              "both_0"),
        Claim("With x_T both ends are reproduced, with one draw of noise they are not.", "first", "both_0", "one_0"),
    ),
    captions=128,
    draws=1,
    measure=measure,
    axis="share of the way",
)  # fmt: skip
