"""Trains dalle2-pytorch's and our prior and decoder on the same pictures, for as long, and compares what they draw.

    python experiments/peer/run.py --python runs/peer/venv/bin/python --workdir runs/peer

Both sides get the pictures of emoji scenes of one object, at 16 px, and embeddings of the CLIP that comes with this
package. Learning rates and objectives are swept in short runs, and judged by what is drawn for captions of the training
split; the best of each side is then trained by two seeds. A run's steps are as many as fit into its minutes, those of
importing and compiling included. Stopped, the same command goes on. Writes report.json beside this file, and tables.md.
--python is of an environment with dalle2-pytorch and CPU torch. The machine should be otherwise quiet.
"""

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from unclip_jax import cli, shipped
from unclip_jax.cascade import Cascade
from unclip_jax.data import emoji_scenes
from unclip_jax.data.transforms import area_resize
from unclip_jax.embed import embed_dataset
from unclip_jax.evaluation import alignment
from unclip_jax.model import Model

HERE = Path(__file__).parent
SIDES = {"ours": "unclip_jax", "theirs": "dalle2-pytorch"}
RATES = (3e-4, 1e-3, 3e-3)
SWEPT = {  # side, model → what else is swept besides the learning rate
    ("ours", "prior"): [{}],
    ("ours", "decoder"): [{"predicts": "x0"}, {"predicts": "eps"}],
    ("theirs", "prior"): [{"encodings": True}, {"encodings": False}],
    ("theirs", "decoder"): [{"predicts": "x0"}, {"predicts": "eps"}, {"predicts": "v"}],
}
SECONDS = {"prior": {"sweep": 45, "full": 120}, "decoder": {"sweep": 90, "full": 360}}
TRIAL = 60  # steps that tell how long a step takes
SEEDS = (0, 1)
SIZE = 16  # of the decoders' pictures


class Bench:
    """Runs both sides below a folder, each run once."""

    def __init__(self, workdir: Path, python: str):
        self.workdir, self.data = workdir, workdir / "data.npz"
        self.commands = {"ours": [sys.executable, HERE / "ours.py"], "theirs": [python, HERE / "theirs.py"]}

    def run(self, side: str, model: str, name: str, **options) -> dict:
        """Trains a model and draws with it. Returns its report, and its pictures or embeddings as "drawn"."""
        out = self.workdir / f"{side}_{model}_{name}"
        if not out.with_suffix(".json").exists():
            print(out.name, options, file=sys.stderr, flush=True)
            subprocess.run([*self.commands[side], model, self.data, out, json.dumps(options)], check=True)
        with np.load(out.with_suffix(".npz")) as file:
            drawn = {key: file[key] for key in file.files}
        return json.loads(out.with_suffix(".json").read_text()) | {"drawn": drawn, "path": str(out.with_suffix(".npz"))}

    def steps(self, side: str, model: str, length: str, options: dict) -> int:
        """Tells how many steps fit into a run's seconds, by a trial."""
        name = "_".join(str(value) for value in options.values() if not isinstance(value, float))
        trial = self.run(side, model, f"trial_{name}", steps=TRIAL, **options)
        start = trial["training_seconds"] - TRIAL * trial["step_seconds"]
        return int((SECONDS[model][length] - start) / trial["step_seconds"])

    def sweep(self, side: str, model: str) -> tuple[dict, list[dict]]:
        """Tries all settings. Returns the best, and what each gave."""
        found = []
        for rate, other in itertools.product(RATES, SWEPT[side, model]):
            options = {"lr": rate, **other}
            name = "_".join(map(str, options.values()))
            steps = self.steps(side, model, "sweep", other)
            report = self.run(side, model, f"sweep_{name}", steps=steps, seed=9, **options)
            score = self.score(model, report["drawn"]["known"], "known")["both" if model == "decoder" else "cosine"]
            found.append(options | {"steps": steps, "score": score})
        best = max(found, key=lambda one: one["score"])
        return {name: value for name, value in best.items() if name not in ("steps", "score")}, found

    def score(self, model: str, drawn: np.ndarray, split: str) -> dict[str, float]:
        """Computes the share of pictures with the right object and background, or embeddings' cosine to the true."""
        with np.load(self.data) as data:
            if model == "prior":
                true = data[f"{split}_z_image"]
                lengths = np.linalg.norm(drawn, axis=1) * np.linalg.norm(true, axis=1)
                return {"cosine": float(np.mean(np.sum(drawn * true, axis=1) / lengths))}
            results = alignment.score(drawn, list(data[f"{split}_objects"]), list(data[f"{split}_colours"]))
        return {name: float(result.value) for name, result in results.items()}


def export(bench: Bench) -> None:
    """Stores pictures, captions, embeddings and token states for both sides, and embeds our dataset."""
    if bench.data.exists():
        return
    config = cli.load_config("configs/decoder.py:tiny").copy_and_resolve_references().unlock()
    config.data.data_dir, config.clip.bundle = str(bench.workdir / "data"), str(shipped.FOLDER / "clip")
    config.model.embedding_dim = Model.load(shipped.FOLDER / "clip", ("clip",)).stage.config.model.dim
    embed_dataset(config, bench.workdir / "embeddings", 0, 1, "float32", 1)
    clip = Model.load(shipped.FOLDER / "clip", ("clip",))
    cascade, context = Cascade(clip, None, None, []), clip.stage.config.model.text.context
    projection, arrays = np.asarray(clip.params["text"]["projection"]["kernel"]), {}
    for split in ("train", "test"):
        scenes, captions = zip(*emoji_scenes.scenes("single", split), strict=True)
        pictures = [emoji_scenes.render(scene, 64) for scene in scenes]
        tokens, lengths = clip.tokenizer.encode(list(captions), context, ends=True)
        rows = [slice(start, start + 64) for start in range(0, len(tokens), 64)]
        parts = [clip.stage.embed_texts_with_states(clip.params, tokens[part], lengths[part]) for part in rows]
        states = np.concatenate([np.asarray(part[1]) for part in parts])
        states = np.where(np.arange(context)[None, :, None] < lengths[:, None, None], states, 0).astype(np.float32)
        arrays |= {
            f"{split}_images": np.stack([area_resize(picture, SIZE) for picture in pictures]),
            f"{split}_z_image": cascade.image_embeddings(pictures),
            f"{split}_z_text": np.concatenate([np.asarray(part[0]) for part in parts]),
            f"{split}_states": states,
            f"{split}_projected": states @ projection,  # as wide as embeddings, which their prior asks for
            f"{split}_captions": np.array(captions),
            f"{split}_objects": np.array([scene.object for scene in scenes]),
            f"{split}_colours": np.array([scene.colour for scene in scenes]),
        }
    some = np.random.default_rng(0).permutation(len(arrays["train_images"]))[: len(arrays["test_images"])]
    arrays |= {f"known_{name[6:]}": rows[some] for name, rows in arrays.items() if name.startswith("train_")}
    np.savez(bench.data, **arrays)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="Python that has dalle2-pytorch")
    parser.add_argument("--workdir", type=Path, default=Path("runs/peer"))
    args = parser.parse_args()
    args.workdir.mkdir(parents=True, exist_ok=True)
    bench = Bench(args.workdir.resolve(), args.python)
    export(bench)
    report: dict[str, Any] = {}
    for side in SIDES:
        report[side] = {"sweep": {}, "runs": []}
        best = {}
        for model in ("prior", "decoder"):
            best[model], report[side]["sweep"][model] = bench.sweep(side, model)
        for seed in SEEDS:
            z = ""
            for model, options in best.items():
                others = {name: value for name, value in options.items() if name != "lr"}
                options = options | {"steps": bench.steps(side, model, "full", others), "seed": seed}
                options |= {"z": z} if model == "decoder" else {}
                run = bench.run(side, model, f"full_{seed}", **options)
                z = run["path"]
                scores = {name: bench.score(model, drawn, "known" if name == "known" else "test")
                          for name, drawn in run["drawn"].items() if name != "full" or model == "decoder"}  # fmt: skip
                kept = {name: value for name, value in run.items() if name not in ("drawn", "path")}
                kept["options"].pop("z", None)
                report[side]["runs"].append({"model": model, "scores": scores} | kept)
    (HERE / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (HERE / "tables.md").write_text(tables(report))
    print(tables(report))


def tables(report: dict) -> str:
    """Writes quality and speed as tables of Markdown, a row for each side and seed, or side."""
    lines = ["| | seed | prior's cosine | true embeddings: object | background | both | whole: both |"]
    lines.append("|---|--:|--:|--:|--:|--:|--:|")
    for side, label in SIDES.items():
        for seed in SEEDS:
            prior, decoder = (next(run for run in report[side]["runs"] if run["model"] == model
                                   and run["options"]["seed"] == seed) for model in ("prior", "decoder"))  # fmt: skip
            true, whole = decoder["scores"]["test"], decoder["scores"]["full"]
            numbers = prior["scores"]["test"]["cosine"], true["object"], true["background"], true["both"], whole["both"]
            lines.append(f"| {label} | {seed} | {' | '.join(f'{number:.3f}' for number in numbers)} |")
    lines += ["", "| | model | parameters | seconds | steps | pictures/s in training | drawn/s | import s | GiB |"]
    lines.append("|---|---|--:|--:|--:|--:|--:|--:|--:|")
    batch = {"prior": 128, "decoder": 32}
    for side, label in SIDES.items():
        for run in report[side]["runs"][:2]:
            cells = (f"{run['parameters']:,}", f"{run['training_seconds']:.0f}", f"{run['options']['steps']:,}",
                     f"{batch[run['model']] / run['step_seconds']:.0f}", f"{64 / run['drawing_seconds']:.1f}",
                     f"{run['import_seconds']:.1f}", f"{run['peak_memory_gib']:.1f}")  # fmt: skip
            lines.append(f"| {label} | {run['model']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
