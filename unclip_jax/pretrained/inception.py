"""The Inception-v3 of TensorFlow's graph of 2015, from the PyTorch file that torch-fidelity and pytorch-fid publish.

TensorFlow's own file, a frozen graph (.pb), is not read.
"""

import hashlib
import re
import sys
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from unclip_jax.bundle import save_bundle
from unclip_jax.errors import UserError
from unclip_jax.evaluation.features import INCEPTION
from unclip_jax.models.inception import CLASSES, parameter_shapes
from unclip_jax.pretrained.layers import dense
from unclip_jax.pretrained.state_dict import StateDict, read
from unclip_jax.training.leaves import named_leaves

EPSILON = 1e-3  # of batch normalisation
SUFFIXES = (".pth", ".pt", ".safetensors")


def save(source: Path, out: Path) -> int:
    """Converts a file, or the one file of a folder, to a folder that `evaluation.features.inception` reads.

    It has a bundle's form and checksum, and "inception" in the place of a stage's name: no command trains it or draws
    with it. Raises UserError for what is missing, damaged or another network.
    """
    path = _weights_of(source)
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    # PyTorch's custom: the name of a published file ends with the start of its sha256.
    stated = re.search(r"-([0-9a-f]{8,})$", path.stem)
    if stated and not sha256.startswith(stated[1]):
        raise UserError(f"{path} is not the file that its name says: its sha256 is {sha256}; download it again")
    params = convert(StateDict(read(path), str(path)))
    identity = save_bundle(
        out, INCEPTION, ConfigDict(), params, None, "", {"source": path.name, "source_sha256": sha256}
    )
    print(f"{out}: Inception-v3, sha256 {identity}", file=sys.stderr, flush=True)
    return 0


def convert(weights: StateDict) -> dict:
    """Parameters of `models.inception.Inception`, the batch normalisations folded into the convolutions.

    (w x - mean) γ / √(var + ε) + β = (w γ / √(var + ε)) x + (β - mean γ / √(var + ε)), computed in float64.
    """
    params: dict = {}
    for name, kernel in named_leaves(parameter_shapes()).items():
        *modules, leaf = name.split("/")
        if leaf != "kernel" or modules == ["fc"]:
            continue
        height, width, inputs, outputs = kernel.shape
        place = ".".join(modules)
        w = weights.take(f"{place}.conv.weight", outputs, inputs, height, width).astype(np.float64)
        norm = ("weight", "bias", "running_mean", "running_var")
        gamma, beta, mean, variance = (weights.take(f"{place}.bn.{part}", outputs).astype(np.float64) for part in norm)
        weights.skip(f"{place}.bn.num_batches_tracked")
        gain = gamma / np.sqrt(variance + EPSILON)
        folded = {"kernel": w.transpose(2, 3, 1, 0) * gain, "bias": beta - mean * gain}
        node = params
        for module in modules:
            node = node.setdefault(module, {})
        node.update({part: value.astype(np.float32) for part, value in folded.items()})
    params["fc"] = dense(weights, "fc", 2048, CLASSES, bias=False)
    weights.skip("fc.bias")  # no metric uses it
    weights.finish()
    if not all(np.isfinite(leaf).all() for leaf in named_leaves(params).values()):
        raise UserError(f"{weights.source} holds numbers that are not finite: download it again")
    return params


def _weights_of(source: Path) -> Path:
    if source.suffix == ".pb":
        raise UserError(f"{source} is a graph of TensorFlow, which is not read: give torch-fidelity's PyTorch file")
    if source.is_file():
        return source
    found = sorted(path for path in source.iterdir() if path.suffix in SUFFIXES)
    if len(found) != 1:
        raise UserError(f"{source} holds {len(found)} files of weights ({', '.join(SUFFIXES)}): name Inception-v3's")
    return found[0]
