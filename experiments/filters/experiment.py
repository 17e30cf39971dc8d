"""A filter of training pictures, as GLIDE's for people: here for foxes."""

import numpy as np

from unclip_jax.cascade import Cascade
from unclip_jax.data import filtering, varied_scenes
from unclip_jax.trials import Arm, Claim, Experiment, Lab, Values

FOUND = "fox"
OTHERS = 5  # pictures of something else, for each of what is to be found
HELD_OUT = 0.2  # share of the labelled pictures by which the bias is set
NEW = 1_000_000  # number of the first new scene, beyond all datasets and all labelled ones
CARD = {"weights": "the CLIP of this package"}


def measure(lab: Lab, cascade: Cascade, arm: Arm) -> Values:
    """Trains a filter on `arm.x` labelled foxes and counts in new pictures: "missed", foxes that it does not find;
    "lost", other pictures in which it finds one. Of the arm "limit": what is allowed to be missed."""
    many = lab.experiment.captions
    if arm.name == "limit":
        return {"missed": np.full((many, 1), 0.01), "lost": np.zeros((many, 1))}
    count = int(arm.x)
    foxes = cascade.image_embeddings(scenes(True, 0, count)), cascade.image_embeddings(scenes(False, 0, OTHERS * count))
    new = [cascade.image_embeddings(scenes(is_fox, NEW, many)) for is_fox in (True, False)]
    fitted = [rows[int(HELD_OUT * len(rows)) :] for rows in foxes]
    found = filtering.fit(*fitted, CARD).biased(foxes[0][: int(HELD_OUT * count)], 0.01)
    missed, lost = found.scores(new[0], CARD) < 0, found.scores(new[1], CARD) >= 0
    return {"missed": missed[:, None].astype(np.float64), "lost": lost[:, None].astype(np.float64)}


def scenes(with_fox: bool, start: int, count: int) -> list[np.ndarray]:
    """Renders the first `count` scenes from `start` on that show a fox, or that do not."""
    found: list[np.ndarray] = []
    while len(found) < count:
        scene = varied_scenes.scene_at("train", start)[0]
        if (scene.object == FOUND) == with_fox:
            found.append(varied_scenes.render(scene, varied_scenes.FRAME))
        start += 1
    return found


COUNTS = (100, 500, 2000)

EXPERIMENT = Experiment(
    question="Does an SVM on CLIP embeddings find what is to be left out of training?",
    paper="GLIDE, appendix F",
    models=("clip",),
    arms=(
        *(Arm(f"foxes_{n}", f"{n} labelled foxes", x=n, series="filter") for n in COUNTS),
        Arm("limit", "1% allowed", x=max(COUNTS), series="allowed"),
    ),
    measures={"missed": "foxes missed", "lost": "other pictures lost"},
    claims=(
        Claim("Fewer than 1% are missed.", "missed", "limit", f"foxes_{max(COUNTS)}"),
        Claim(
            "More labels cost fewer other pictures.", "lost", f"foxes_{min(COUNTS)}", f"foxes_{max(COUNTS)}", ours=True
        ),
    ),
    captions=2048,  # new pictures of either kind
    draws=1,
    measure=measure,
    axis="labelled foxes",
)
