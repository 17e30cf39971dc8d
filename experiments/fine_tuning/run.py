"""Teaches a decoder an object that it never saw, from some thirty pictures: all of it, or low-rank changes (LoRA).

    python experiments/fine_tuning/run.py --bundle quickstart/bundle --workdir runs/fine_tuning

The CLIP of --bundle has seen the object, as a public CLIP has seen most of what a user will teach. Writes pictures.png
and report.json here and prints the numbers. What was trained before, in --workdir, is not trained again.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from unclip_jax import cli
from unclip_jax.cascade import Cascade
from unclip_jax.data import emoji_scenes, sources
from unclip_jax.data.emoji_scenes import Scene
from unclip_jax.evaluation import alignment
from unclip_jax.model import Model

HERE = Path(__file__).parent
OBJECT = "fox"
PICTURES = 31
SEEDS = 16  # drawings of the object on each of the colours
TUNINGS = {
    "all of it": ["--config.optim.learning_rate=3e-4"],
    "low rank, 4": ["--config.optim.learning_rate=3e-3", "--config.optim.lora_rank=4"],
}
STEPS = (50, 300)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True, help="has the CLIP")
    parser.add_argument("--workdir", type=Path, required=True)
    args = parser.parse_args()
    cli.enable_compilation_cache()
    clip = args.bundle / "clip"
    scenes = list(emoji_scenes.scenes("single", "train"))
    with_it = [pair for pair in scenes if pair[0].object == OBJECT]
    few = [with_it[i * len(with_it) // PICTURES] for i in range(PICTURES)]
    everything_else = write(args.workdir / "others", [pair for pair in scenes if pair[0].object != OBJECT])
    report = {"object": OBJECT, "pictures": write(args.workdir / "few", few), "pictures_before": everything_else}

    train(args.workdir / "base", clip, args.workdir / "others")
    rows, report["rows"] = [], {}
    for name, bundle, took in tunings(args.workdir, clip):
        cascade = Cascade.load(args.bundle)
        cascade = Cascade(cascade.clip, None, Model.load(bundle, ("decoder",), cascade.clip), [])
        drawn, report["rows"][name] = measure(cascade)
        report["rows"][name]["minutes"] = took
        print(f"{name}: {json.dumps(report['rows'][name])}", flush=True)
        rows.append(drawn)
    Image.fromarray(np.concatenate(rows)).resize((16 * 32, len(rows) * 32), Image.Resampling.NEAREST).save(
        HERE / "pictures.png"
    )
    (HERE / "report.json").write_text(json.dumps(report, indent=1) + "\n")


def tunings(workdir: Path, clip: Path) -> Iterator[tuple[str, Path, float]]:
    """Yields the base and each tuned decoder: its name, its bundle and the minutes that its training took."""
    yield "before", workdir / "base" / "bundle", minutes(workdir / "base")
    for kind, flags in TUNINGS.items():
        for steps in STEPS:
            run = workdir / f"{kind} {steps}".replace(",", "").replace(" ", "_")
            base = [f"--config.init.bundle={workdir / 'base' / 'bundle'}", f"--config.train.steps={steps}"]
            train(run, clip, workdir / "few", "--config.optim.warmup_steps=10", *base, *flags)
            yield f"{kind}, {steps} steps", run / "bundle", minutes(run)


def train(run: Path, clip: Path, folder: Path, *flags: str) -> None:
    """Trains configs/decoder.py:tiny on a folder, unless it was trained before."""
    if (run / "bundle").exists():
        return
    command = [sys.executable, "-m", "unclip_jax.train", "--config=configs/decoder.py:tiny", f"--workdir={run}"]
    command += [f"--config.clip.bundle={clip}", f"--config.data.source=folder:{folder}", *flags]
    print(" ".join(command), flush=True)
    began = time.monotonic()
    subprocess.run(command, check=True)
    (run / "seconds.txt").write_text(f"{time.monotonic() - began:.0f}\n")


def minutes(run: Path) -> float:
    return round(int((run / "seconds.txt").read_text()) / 60, 1)


def write(folder: Path, pairs: list[tuple[Scene, str]]) -> int:
    """Writes scenes as pictures of 64 px with their captions; counts those that training sees."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, (scene, caption) in enumerate(pairs):
        Image.fromarray(emoji_scenes.render(scene, 64)).save(folder / f"{i:04}.png")
        (folder / f"{i:04}.txt").write_text(caption)
    return len(sources.open_source(f"folder:{folder}", "train", "", "image", "caption"))


def measure(cascade: Cascade) -> tuple[np.ndarray, dict]:
    """Draws the new object on each colour and held-out scenes of the old ones, given their true embeddings: the first
    drawings of both kinds as a row of pictures, and the shares that show the object and the background asked for."""
    colours = list(emoji_scenes.colours())
    new = [Scene(OBJECT, colour) for colour in colours for _ in range(SEEDS)]
    old = [scene for scene, _ in emoji_scenes.scenes("single", "test") if scene.object != OBJECT] * 2
    found, row = {}, []
    for name, scenes in (("new", new), ("old", old)):
        z = cascade.image_embeddings(np.stack([emoji_scenes.render(scene, 64) for scene in scenes]))
        captions = [emoji_scenes.caption(scene) for scene in scenes]
        drawn = cascade.generate(captions, 0, embeddings=z)["images"][0]
        results = alignment.score(drawn, [scene.object for scene in scenes], [scene.colour for scene in scenes])
        found[name] = {
            part: {"value": round(r.value, 4), "low": round(r.low, 4), "high": round(r.high, 4), "n": r.n}
            for part, r in results.items()
        }
        row += list(drawn[:: SEEDS if name == "new" else 8][:8])
    return np.concatenate(row, axis=1), found


if __name__ == "__main__":
    main()
