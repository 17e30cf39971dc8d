"""Measures decoders of emoji scenes, of the paper's recipe and of others, on 512 drawings of held-out scenes.

    python experiments/recipe/measure.py --clip quickstart/bundle/clip --runs runs

Measures those of the runs that README.md, beside this file, lists which are below --runs; report.json keeps what it
has of others. Writes report.json and curve.svg here and prints the numbers.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

from unclip_jax import cli
from unclip_jax.cascade import Cascade
from unclip_jax.data import emoji_scenes
from unclip_jax.evaluation import alignment
from unclip_jax.model import Model

HERE = Path(__file__).parent
DRAWS = 8  # of each of the 64 held-out scenes
ARMS = {  # run, and how it is sampled where that is not its config's way
    "tiny's recipe": ("decoder_tiny", {}),
    "the paper's": ("decoder_miniature", {}),
    "the paper's, DDIM of 25 steps": ("decoder_miniature", {"sampler": "ddim", "steps": "25"}),
    "bfloat16, 3000 steps": ("decoder_bfloat16", {"sampler": "ddim", "steps": "25"}),
    "float32, 3000 steps": ("decoder_float32", {"sampler": "ddim", "steps": "25"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip", required=True, help="bundle of the CLIP that the decoders were trained with")
    parser.add_argument("--runs", type=Path, required=True)
    args = parser.parse_args()
    cli.enable_compilation_cache()
    clip = Model.load(args.clip, ("clip",))
    report = json.loads((HERE / "report.json").read_text())
    arms = report["arms"]
    for name, (run, sampling) in ARMS.items():
        if not (args.runs / run / "bundle").exists():
            continue
        decoder = Model.load(args.runs / run / "bundle", ("decoder",), clip)
        arms[name] = measure(Cascade(clip, None, decoder.sampled_by(**sampling), []))
        arms[name]["training_seconds"] = lines(args.runs / run / "metrics.jsonl")[-1]["seconds"]
        print(f"{name}: {json.dumps(arms[name])}", flush=True)
    if (args.runs / "decoder_miniature").exists():
        evaluations = lines(args.runs / "decoder_miniature" / "evaluation.jsonl")
        report["curve"] = [line for line in evaluations if "alignment_both" in line]
    (HERE / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(report["curve"], arms)


def measure(cascade: Cascade) -> dict:
    """Draws every held-out scene `DRAWS` times, given its true embedding and its caption."""
    scenes, captions = zip(*emoji_scenes.scenes("single", "test"), strict=True)
    z = cascade.image_embeddings(np.stack([emoji_scenes.render(scene, 64) for scene in scenes]))
    began, drawn = time.monotonic(), []
    for k in range(DRAWS):
        drawn.append(cascade.generate(list(captions), 0, embeddings=z, draws=[k] * len(captions))["images"][0])
    seconds = time.monotonic() - began
    objects, colours = ([getattr(scene, part) for scene in scenes] * DRAWS for part in ("object", "colour"))
    results = alignment.score(np.concatenate(drawn), objects, colours)
    return {
        name: {"value": round(r.value, 4), "standard_error": round(error(r.value, r.n), 4), "n": r.n}
        for name, r in results.items()
    } | {"drawing_seconds": round(seconds, 1)}


def error(share: float, n: int) -> float:
    """Standard error of a share of n independent drawings."""
    return float(np.sqrt(share * (1 - share) / n))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def draw(curve: list[dict], arms: dict) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    steps, both, low, high = (
        [line[name] for line in curve]
        for name in ("step", "alignment_both", "alignment_both_low", "alignment_both_high")
    )
    bars = np.abs(np.array([low, high]) - both)
    axes.errorbar(steps, both, yerr=bars, marker="o", capsize=3, label="the paper's recipe, 64 held-out scenes")
    tiny = arms["tiny's recipe"]["both"]["value"]
    axes.axhline(tiny, color="gray", linestyle="--", label=f"tiny's recipe at its end, {DRAWS * 64} drawings")
    axes.set(xlabel="steps of 32 pictures", ylabel="object and background right", ylim=(0, 1.02))
    axes.legend(loc="lower right")
    figure.savefig(HERE / "curve.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
