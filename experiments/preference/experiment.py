"""A linear probe of CLIP embeddings that stands in for people who compare pictures."""

import numpy as np

from unclip_jax.cascade import Cascade
from unclip_jax.data import varied_scenes
from unclip_jax.evaluation.probes import fit_preference
from unclip_jax.trials import Arm, Claim, Experiment, Lab, Values

CARD = {"weights": "the CLIP of this package"}


def measure(lab: Lab, cascade: Cascade, arm: Arm) -> Values:
    """Fits a probe to `arm.x` comparisons by somebody who likes neat pictures. "agrees": whether it prefers
    the same picture in new comparisons. Of the arm "coin": half of them."""
    if arm.name == "coin":
        return {"agrees": np.full((lab.experiment.captions, 1), 0.5)}
    x, y, preferred = comparisons(cascade, 0, int(arm.x))
    probe, _ = fit_preference(x, y, preferred, CARD)
    x, y, preferred = comparisons(cascade, varied_scenes.COUNTS["train"], lab.experiment.captions)
    return {"agrees": ((probe(y, CARD) > probe(x, CARD)) == preferred)[:, None].astype(np.float64)}


def comparisons(cascade: Cascade, start: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeds `count` pairs of scenes from `start` on that are not equally neat; tells of which the second is neater."""
    pairs: list[tuple[varied_scenes.Scene, varied_scenes.Scene]] = []
    while len(pairs) < count:
        pair = varied_scenes.scene_at("train", start)[0], varied_scenes.scene_at("train", start + 1)[0]
        if neatness(pair[0]) != neatness(pair[1]):
            pairs.append(pair)
        start += 2
    embeddings = (
        cascade.image_embeddings([varied_scenes.render(scene, varied_scenes.FRAME) for scene in side])
        for side in zip(*pairs, strict=True)
    )
    return *embeddings, np.array([neatness(second) > neatness(first) for first, second in pairs])


def neatness(scene: varied_scenes.Scene) -> int:
    """Counts what is neat in a scene: an upright object, in the middle, on a plain background."""
    return (scene.rotation == "upright") + (scene.place == "centre") + (scene.pattern == "plain")


COUNTS = (250, 500, 1000, 2000)

EXPERIMENT = Experiment(
    question="Does a linear probe of CLIP embeddings tell which picture is preferred?",
    paper="unCLIP, appendix A",
    models=("clip",),
    arms=(
        *(Arm(f"pairs_{n}", f"{n} comparisons", x=n, series="probe") for n in COUNTS),
        Arm("coin", "a coin", x=max(COUNTS), series="coin"),
    ),
    measures={"agrees": "agreement with new comparisons"},
    claims=(
        Claim("The probe tells which of two pictures is preferred.", "agrees", f"pairs_{max(COUNTS)}", "coin"),
        Claim("More comparisons make it better.", "agrees", f"pairs_{max(COUNTS)}", f"pairs_{min(COUNTS)}", ours=True),
    ),
    captions=1024,  # new pairs of pictures
    draws=1,
    measure=measure,
    axis="comparisons",
)
