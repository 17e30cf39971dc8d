"""Measures how far the pictures of each sampler are from true ones, and writes a table of samplers and steps.

    unclip experiment decoder_steps --workdir runs/experiments
    unclip experiment prior_steps --workdir runs/experiments
    python experiments/decoder_steps/frechet.py --workdir runs/experiments

Takes the pictures that the two experiments drew. Fréchet distance is of embeddings by the CLIP that comes with this
package, to those of all test scenes, with a jackknifed 95% interval. Writes frechet.json and samplers.md beside this
file, with the alignment of the experiments' results.jsonl.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from unclip_jax.data import varied_scenes
from unclip_jax.evaluation.frechet import fid, grouped_statistics, statistics
from unclip_jax.experiment import FILE, RESULTS, load
from unclip_jax.trials import Lab

HERE = Path(__file__).parent
CARD = {"features": "the CLIP of this package"}
GROUPS = 16  # of pictures, for the interval
HEAD = """# Samplers and their steps

Written by `frechet.py`. Fréchet distances are of embeddings by the CLIP that comes with this package, with a jackknifed
95% interval. They grow as pictures get fewer: compare them within this table alone.
"""
PARTS = {"decoder_steps": "Decoder", "prior_steps": "Prior"}


def measure(name: str, workdir: Path) -> dict[str, dict[str, float]]:
    """Computes the distance of each arm's pictures, which are drawn where they are not there."""
    experiment = load(HERE.parent / name / FILE)
    lab = Lab(experiment, workdir, str(workdir / "data"))
    true = [varied_scenes.render(scene, varied_scenes.FRAME) for scene, _, _ in varied_scenes.scenes("test")]
    reference, found = statistics([lab.cascade(experiment.arms[0]).image_embeddings(true)], CARD), {}
    for arm in experiment.arms:
        cascade = lab.cascade(arm)
        images = lab.draw(cascade, arm)
        embeddings = cascade.image_embeddings(list(images.reshape(-1, *images.shape[2:])))
        result = fid(grouped_statistics(np.array_split(embeddings, GROUPS), GROUPS, CARD), reference)
        numbers = {part: round(float(getattr(result, part)), 4) for part in ("value", "low", "high")}
        found[arm.name] = numbers | {"n": result.n, "reference": len(true)}
        print(name, arm.label, numbers)
    return found


def table(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """Writes the distances beside the alignment that was published, as a page of Markdown."""
    lines = [HEAD, "| model | sampler | named factors right | Fréchet distance |", "|---|---|--:|--:|"]
    for name, model in PARTS.items():
        path = HERE.parent / name
        results = [json.loads(line) for line in (path / RESULTS).read_text().splitlines()]
        named = {line["arm"]: line for line in results if line.get("measure") == "named" and "arm" in line}
        for arm in load(path / FILE).arms:
            numbers = (f"{one['value']:.3f} [{one['low']:.3f}, {one['high']:.3f}]"
                       for one in (named[arm.name], found[name][arm.name]))  # fmt: skip
            lines.append(f"| {model} | {arm.label} | {' | '.join(numbers)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, type=Path, help="that of the experiments")
    args = parser.parse_args()
    found = {name: measure(name, args.workdir.resolve()) for name in PARTS}
    (HERE / "frechet.json").write_text(json.dumps(found, indent=2) + "\n")
    (HERE / "samplers.md").write_text(table(found))
    print(table(found))


if __name__ == "__main__":
    main()
