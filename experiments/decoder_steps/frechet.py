"""Measures how far the pictures of each arm are from true ones, after `unclip experiment decoder_steps`.

    python experiments/decoder_steps/frechet.py --workdir runs/experiments

Fréchet distance of embeddings by the shipped CLIP to those of all test scenes, with a jackknifed 95 % interval. The
experiment "prior_steps" is measured likewise. Writes frechet.json beside this file.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from unclip_jax.data import varied_scenes
from unclip_jax.evaluation.frechet import fid, grouped_statistics, statistics
from unclip_jax.experiment import FILE, load
from unclip_jax.trials import Lab

FOLDER = Path(__file__).parents[1]
CARD = {"features": "the CLIP of this package"}
GROUPS = 16  # of pictures, for the interval


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="that of the experiments")
    args = parser.parse_args()
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in ("decoder_steps", "prior_steps"):
        experiment = load(FOLDER / name / FILE)
        lab = Lab(experiment, Path(args.workdir).resolve(), f"{args.workdir}/data")
        true = [varied_scenes.render(scene, varied_scenes.FRAME) for scene, _, _ in varied_scenes.scenes("test")]
        reference = statistics([lab.cascade(experiment.arms[0]).image_embeddings(true)], CARD)
        found[name] = {}
        for arm in experiment.arms:
            cascade = lab.cascade(arm)
            images = lab.draw(cascade, arm)
            embeddings = cascade.image_embeddings(list(images.reshape(-1, *images.shape[2:])))
            result = fid(grouped_statistics(np.array_split(embeddings, GROUPS), GROUPS, CARD), reference)
            numbers = {part: round(float(getattr(result, part)), 4) for part in ("value", "low", "high")}
            found[name][arm.name] = numbers | {"n": result.n, "reference": len(true)}
            print(name, arm.label, numbers)
    (FOLDER / "decoder_steps" / "frechet.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
