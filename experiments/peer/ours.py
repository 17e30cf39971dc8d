"""Trains our prior or decoder, and draws with it. `run.py`, beside this file, calls it.

    python ours.py MODEL DATA OUT OPTIONS

The arguments are those of theirs.py, OPTIONS a JSON object of `OPTIONS` below. Training reads the pictures and
embeddings that run.py stored beside DATA. Writes OUT.json and what was drawn, OUT.npz.
"""

import json
import resource
import statistics
import sys
import time
from pathlib import Path

BEGAN = time.monotonic()
import jax  # noqa: E402 - importing is a part of what is timed
import numpy as np  # noqa: E402

from unclip_jax import cli, shipped, train  # noqa: E402
from unclip_jax.cascade import Cascade  # noqa: E402
from unclip_jax.model import Model  # noqa: E402
from unclip_jax.training.leaves import named_leaves  # noqa: E402
from unclip_jax.training.metrics import read_log  # noqa: E402

IMPORTED = time.monotonic() - BEGAN
CONFIGS = {"prior": "configs/prior_diffusion.py:tiny", "decoder": "configs/decoder.py:tiny"}
# z: a file of embeddings to draw from, beside the true ones.
OPTIONS = dict(steps=1300, lr=3e-3, seed=0, predicts="x0", z="")


def config_of(model: str, o: dict, data: Path) -> cli.ConfigDict:
    """Changes a tiny config to the CLIP of this package, and to the objective and learning rate of the options."""
    config = cli.load_config(CONFIGS[model]).copy_and_resolve_references().unlock()
    dim = Model.load(shipped.FOLDER / "clip", ("clip",)).stage.config.model.dim
    config.model.embedding_dim = dim
    config.clip.bundle = str(shipped.FOLDER / "clip")
    config.data.data_dir, config.data.embeddings = str(data.parent / "data"), str(data.parent / "embeddings")
    config.optim.learning_rate = o["lr"]
    config.train.update(dict(steps=o["steps"], seed=o["seed"], eval_size=8, draw_size=8, expected_loss=()))
    if model == "prior":
        config.diffusion.embedding_scale = 0.5375 * dim**0.5
        config.sampling.update(dict(sampler="ddim", steps="64"))  # as theirs; analytic variances take time to find
    elif o["predicts"] != "x0":
        config.diffusion.update(dict(predicts=o["predicts"], snr_clip=()))
    return config.lock()


def draw(model: str, o: dict, data: dict, cascade: Cascade) -> tuple[dict, dict]:
    """Draws embeddings, or pictures from true embeddings and from those in `z`, for held-out and for known captions."""
    drawn, report = {}, {}
    given = {"known": ("known", data["known_z_image"]), "test": ("test", data["test_z_image"])}
    if o["z"]:
        given["full"] = "test", np.load(o["z"])["test"]
    for name, (split, z) in given.items():
        texts, began = list(map(str, data[f"{split}_captions"])), time.monotonic()
        key = jax.random.key(o["seed"])
        drawn[name] = cascade.embeddings(texts, key) if model == "prior" else cascade.decode(z, texts, key)
        report["drawing_seconds"] = time.monotonic() - began  # the last time, when all is compiled
    return report, drawn


def main(model: str, data: str, out: str, options: str) -> None:
    given = json.loads(options)
    if unknown := given.keys() - OPTIONS.keys():
        sys.exit(f"no options {', '.join(sorted(unknown))}: expected some of {', '.join(OPTIONS)}")
    o = OPTIONS | given
    config = config_of(model, o, Path(data).resolve())
    train.run(config, out)
    report = {"training_seconds": time.monotonic() - BEGAN, "import_seconds": IMPORTED, "options": o}
    speed = statistics.median(line["images_per_second"] for line in read_log(Path(out) / "metrics.jsonl"))
    report["step_seconds"] = config.train.batch_size / speed
    clip = Model.load(shipped.FOLDER / "clip", ("clip",))
    trained = Model.load(Path(out) / "bundle", (config.stage,), clip)
    learned = (leaf for name, leaf in named_leaves(trained.params).items() if not name.startswith("fixed"))
    report["parameters"] = sum(map(np.size, learned))
    parts = (trained, None) if model == "prior" else (None, trained)
    with np.load(data) as file:
        said, drawn = draw(model, o, {name: file[name] for name in file.files}, Cascade(clip, *parts, []))
    np.savez(f"{out}.npz", **drawn)
    report |= said | {"peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    Path(f"{out}.json").write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main(*sys.argv[1:])
