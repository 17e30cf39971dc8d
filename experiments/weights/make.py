"""Trains models of the cascade that comes with this package, and puts them into unclip_jax/weights.

    python experiments/weights/make.py clip prior decoder --workdir runs/weights
    python experiments/weights/make.py prior decoder --onward --workdir runs/onward
    python experiments/weights/make.py --measure decoder glide

Each model is trained by its config of size "shipped", against the CLIP in unclip_jax/weights: clip comes first. The
same command continues a training that was stopped. Weights are rounded to float16. --onward begins with the weights
that are there, not with random ones; at first glide begins with the decoder's U-Net (glide_start.py), and noised_clip
with clip. --measure draws captions that were held out, with the cascade of decoder or by glide, and writes how many
pictures show them into the manifest.
"""

import argparse
import datetime
import hashlib
import json
import platform
import shutil
import signal
import sys
import time
from pathlib import Path

import glide_start
import jax
import numpy as np

from unclip_jax import cli, shipped, train
from unclip_jax.bundle import load_bundle, save_bundle
from unclip_jax.cascade import Cascade
from unclip_jax.data import emoji_scenes, varied_scenes
from unclip_jax.evaluation import scene_scores
from unclip_jax.evaluation.intervals import Result
from unclip_jax.paths import SHIPPED, to_path
from unclip_jax.training.metrics import read_log
from unclip_jax.trials import CONFIGS, digest

MODELS = CONFIGS | {"prior_ar": "prior_ar", "glide": "glide"}
# Models that know already what they have to learn of another: a decoder how to draw, a CLIP what captions mean.
BEGINNINGS = {"glide": "decoder", "noised_clip": "clip"}
DRAWING = {"decoder": SHIPPED, "glide": f"{SHIPPED}glide"}  # model that draws → its cascade
PICTURES = 512  # of each kind of scenes
ROWS = 64  # that are drawn at once


def make(name: str, workdir: str, data_dir: str, onward: bool) -> None:
    """Trains a model, or goes on with its run, and stores it as unclip_jax/weights/NAME.

    onward: the run begins with the weights that are stored there, of which the manifest keeps what it knew.
    """
    config = cli.load_config(f"configs/{MODELS[name]}.py:shipped").copy_and_resolve_references()
    stored = config.copy_and_resolve_references()  # without this machine's folders
    folder, begun_with = shipped.FOLDER / name, to_path(workdir) / f"{name}_begun_with"
    with config.unlocked():
        config.data.data_dir = data_dir
        if "clip" in config:
            config.clip.bundle = str(shipped.FOLDER / "clip")
    known = dict(digest=digest(config))
    if source := name if onward else BEGINNINGS.get(name):
        if not begun_with.exists():
            if name == "glide" and not onward:
                glide_start.store(begun_with, stored, load_bundle(shipped.FOLDER / "decoder"))
            else:  # a copy, since the weights are replaced in the end
                shutil.copytree(shipped.FOLDER / source, begun_with)
            before = {key: value for key, value in shipped.manifest()[source].items() if key != "measured"}
            (begun_with / "known.json").write_text(json.dumps({"model": source} | before))
        known["begun_with"] = json.loads((begun_with / "known.json").read_text())
        with config.unlocked():
            config.init.bundle = str(begun_with)
    report = train.run(config, f"{workdir}/{name}")
    if isinstance(report, signal.Signals):
        sys.exit(train.exit_status(report))
    trained = load_bundle(f"{workdir}/{name}/bundle")
    parts = trained.params, trained.tokenizer_bytes, trained.clip_identity, trained.extra
    save_bundle(folder, trained.stage, stored, *parts, half=True)
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    write(
        name,
        **known,
        sha256={file: hashlib.sha256(content).hexdigest() for file, content in files.items()},
        bytes=sum(map(len, files.values())),
        made=f"{datetime.date.today()}, Python {platform.python_version()}, jax {jax.__version__}",
        minutes=round(read_log(to_path(workdir) / name / "metrics.jsonl")[-1]["seconds"] / 60),
        held_out=held_out(to_path(workdir) / name),
    )


def held_out(run: Path) -> dict[str, float]:
    """Returns the last evaluation of a run, on held-out pictures, for the manifest."""
    return {key: round(value, 4) for key, value in read_log(run / "evaluation.jsonl")[-1].items()}


def measure(name: str) -> None:
    """Draws scenes of the test splits with a model of `DRAWING`, and writes what is right of them into the manifest."""
    cascade = Cascade.load(DRAWING[name])
    single = [text for _, text in emoji_scenes.scenes("single", "test")]
    varied = [varied_scenes.scene_at("test", index)[2] for index in range(PICTURES)]
    found = {}
    for kind, captions in {"single": single * (PICTURES // len(single)), "varied": varied}.items():
        began, images = time.monotonic(), []
        for start in range(0, PICTURES, ROWS):
            rows = range(start, start + ROWS)
            images += [*cascade.generate(captions[start : start + ROWS], 0, rows=rows)["images"][-1]]
            print(f"{kind}: {len(images)} of {PICTURES}", file=sys.stderr)
        found[kind] = {"seconds": round(time.monotonic() - began)}
        for part, count in (("all", PICTURES), ("first", ROWS)):
            results = scene_scores.score(np.stack(images[:count]), captions[:count])
            kept = [r for r in results if not r.name.startswith(("diversity", "variety"))]  # the manifest stays short
            found[kind][part] = {result.name: rounded(result) for result in kept}
    write(name, measured=found)


def rounded(result: Result) -> dict[str, float]:
    """Returns a result with its interval and n, for JSON."""
    return {part: round(float(getattr(result, part)), 4) for part in ("value", "low", "high")} | {"n": result.n}


def write(name: str, **known) -> None:
    """Updates what the manifest knows of a model."""
    new = shipped.manifest()
    new[name] = new.get(name, {}) | known
    shipped.MANIFEST.write_text(json.dumps(new, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=f"some of {', '.join(MODELS)}")
    parser.add_argument("--workdir", default="runs/weights")
    parser.add_argument("--data-dir", help="folder of the datasets; default: WORKDIR/data")
    parser.add_argument("--onward", action="store_true", help="begin with the weights that are there")
    parser.add_argument("--measure", nargs="+", choices=DRAWING, default=[])
    args = parser.parse_args()
    for name in args.models:
        if name not in MODELS:
            parser.error(f"no model {name!r}: expected some of {', '.join(MODELS)}")
    to_path(args.workdir).mkdir(parents=True, exist_ok=True)
    for name in args.models:
        make(name, args.workdir, args.data_dir or f"{args.workdir}/data", args.onward)
    for name in args.measure:
        measure(name)


if __name__ == "__main__":
    main()
