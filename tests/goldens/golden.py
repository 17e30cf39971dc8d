"""Read the golden files beside this module (NumPy only).

Each `*.npz` holds one small model or function of a public PyTorch reference, run on random weights:

* `meta` (JSON): the configuration, and `weights`: the reference state dict's names and shapes, in order;
* `in/NAME`, `out/NAME`: inputs and expected outputs, float32, in the reference's own layout (NCHW; linear
  weights [out, in]; conv weights [out, in, kh, kw]).

The weights themselves are not stored: `weights(meta)` draws them again from a frozen random stream.
"""

import json
import pathlib

import numpy as np


def load(path):
    """Returns (meta, inputs, outputs) of one golden file."""
    with np.load(pathlib.Path(path)) as f:
        arrays = {name: f[name] for name in f.files}
    inputs, outputs = ({name.removeprefix(side): array for name, array in arrays.items() if name.startswith(side)}
                       for side in ("in/", "out/"))
    return json.loads(str(arrays["meta"])), inputs, outputs


def weights(meta):
    """The reference state dict: name -> float32 array, in PyTorch layout."""
    seeds = meta["seeds"] if isinstance(meta["seeds"], dict) else {"": meta["seeds"][0]}
    out = {}
    for prefix, seed in seeds.items():
        rng = np.random.RandomState(seed)
        for name, shape in meta["weights"]:
            if not name.startswith(prefix):
                continue
            draw = rng.standard_normal(tuple(shape))
            if len(shape) > 1:
                draw = draw / np.sqrt(max(1, int(np.prod(shape[1:]))))
            elif name.endswith(("weight", ".g")):
                draw = 1 + 0.1 * draw
            else:
                draw = 0.1 * draw
            out[name] = draw.astype(np.float32)
    return out
