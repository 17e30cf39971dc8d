"""Trains the paper's whole cascade at a quarter of its resolution, and draws prompts that it never saw.

    python -m unclip_jax.quickstart [--out quickstart]

Five models (16 → 64 → 256 px instead of 64 → 256 → 1024) on emoji scenes, through the same `train.run` and configs as
any other run. It writes OUT/grid.png (64 held-out prompts and their pictures), OUT/report.json, OUT/bundle (for
`sample`) and OUT/runs (each training run). Run again after it was stopped, it goes on from there.
"""

import argparse
import json
import resource
import signal
import statistics
import sys
import time
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from unclip_jax import cli, pictures, train
from unclip_jax.bundle import CONFIG
from unclip_jax.cascade import Cascade
from unclip_jax.data.sources import open_source
from unclip_jax.evaluation.intervals import Result
from unclip_jax.paths import copy_folder, output_folder, write_bytes

STAGES = {
    "clip": "configs/clip.py:tiny",
    "prior": "configs/prior_diffusion.py:tiny",
    "decoder": "configs/decoder.py:tiny",
    "upsampler_256": "configs/upsampler_256.py:tiny",
    "upsampler_1024": "configs/upsampler_1024.py:tiny",
}


def parse(argv: list[str]) -> argparse.Namespace:
    """Reads the command line. Raises UserError for what is wrong with it."""
    parser = cli.Parser("quickstart", __doc__)
    parser.add_argument("--out", default="quickstart", help="folder to write to")
    parser.add_argument("--seed", type=cli.seed, default=0)
    text = "train each model for this many steps only, to try everything out"
    parser.add_argument("--steps", type=cli.whole(1, 10**10), help=text)
    return parser.parse_args(argv[1:])


def main(argv: list[str]) -> int:
    args = parse(argv)
    from unclip_jax.evaluation import alignment  # before any long work, because it needs the packages of [data]

    out = output_folder(args.out)
    cli.enable_compilation_cache()
    began = time.monotonic()
    configs = {name: _config(spec, out, args) for name, spec in STAGES.items()}
    for config in configs.values():
        train.check_config(config, str(out))

    # Every dataset is drawn before anything is trained.
    seconds, speeds, reports = {}, {}, {}
    with _Timer(seconds, "data"):
        for config in configs.values():
            d = config.data
            open_source(d.source, d.split, d.data_dir, d.image_feature, d.caption_feature)

    for i, (name, config) in enumerate(configs.items()):
        print(f"[{i + 1}/{len(configs)}] {name}", file=sys.stderr, flush=True)
        with _Timer(seconds, name):
            reports[name] = train.run(config, str(out / "runs" / name))
        if isinstance(reports[name], signal.Signals):
            return train.exit_status(reports[name])
        copy_folder(out / "runs" / name / "bundle", out / "bundle" / name, CONFIG)
        speeds[name] = _images_per_second(out / "runs" / name / "metrics.jsonl")
        jax.clear_caches()  # the programs of five models would fill the memory

    print("drawing held-out prompts", file=sys.stderr, flush=True)
    with _Timer(seconds, "sample"):
        scores, grid = _draw_held_out(Cascade.load(str(out / "bundle")), args.seed)
    pictures.save_png(out / "grid.png", grid)
    seconds["total"] = time.monotonic() - began
    prior = reports["prior"]["metrics"]
    report = {
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "images_per_second": speeds,
        "alignment": scores | {"chance": alignment.chance()},
        "clip_retrieval": reports["clip"]["metrics"]["retrieval"],
        "prior_cosine": {name: prior[f"cosine_{name}"] for name in ("model", "copy_text", "mean", "shuffled_text")},
        "upsampler_psnr": {
            name: {key: reports[name]["metrics"][key] for key in ("psnr", "psnr_interpolated")}
            for name in ("upsampler_256", "upsampler_1024")
        },
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }
    write_bytes(out / "report.json", json.dumps(report, indent=2).encode() + b"\n")
    print(json.dumps(report, indent=2))
    print(f"look at {out / 'grid.png'}; draw more: {cli.command('sample')} --bundle {out / 'bundle'} --prompt '…'")
    return 0


def _config(spec: str, out: Path, args: argparse.Namespace) -> ConfigDict:
    """Loads a stage's config, with its data, CLIP and seed from this run. out: the folder to write to."""
    config = cli.load_config(spec).unlock()
    config.data.data_dir = str(out / "data")
    config.train.seed = args.seed
    if args.steps is not None:
        config.train.steps = args.steps
    if "clip" in config:
        config.clip.bundle = str(out / "bundle" / "clip")
    return config.lock()


def _draw_held_out(cascade: Cascade, seed: int) -> tuple[dict[str, dict], np.ndarray]:
    """Draws every held-out prompt; returns alignment scores of the pictures, and a grid of them with captions.

    The scores are of the decoder's pictures, of its pictures from true image embeddings instead of the prior's, and of
    the upsampled pictures, which the grid shows.
    """
    from unclip_jax.data import emoji_scenes
    from unclip_jax.evaluation import alignment

    scenes, texts = zip(*emoji_scenes.scenes("single", "test"), strict=True)
    objects, colours = [scene.object for scene in scenes], [scene.colour for scene in scenes]
    drawn = cascade.generate(list(texts), seed)["images"]

    side = cascade.clip.stage.config.model.image_size
    truth = cascade.image_embeddings(np.stack([emoji_scenes.render(scene, side) for scene in scenes]))
    from_truth = cascade.decode(truth, list(texts), jax.random.key(seed))
    images = {"full": drawn[0], "true_embedding": from_truth, "full_upsampled": drawn[-1]}
    scores = {name: _rounded(alignment.score(rows, objects, colours)) for name, rows in images.items()}
    return scores, pictures.grid(drawn[-1], captions=list(texts))


def _rounded(results: dict[str, Result]) -> dict[str, dict[str, float]]:
    """Shortens measured shares, with the ends of their 95 % intervals and n, for the report."""
    parts = ("value", "low", "high", "n")
    return {name: {part: round(getattr(result, part), 3) for part in parts} for name, result in results.items()}


def _images_per_second(metrics: Path) -> float:
    """Reads the median speed of a training run from its metrics.jsonl."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return round(statistics.median(line["images_per_second"] for line in lines), 1)


class _Timer:
    """Context that stores its seconds in a dict under a name."""

    def __init__(self, seconds: dict[str, float], name: str):
        self._seconds, self._name = seconds, name

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *error: object) -> None:
        self._seconds[self._name] = time.monotonic() - self._began


if __name__ == "__main__":
    cli.run(main)
