"""Names for the types that functions exchange: arrays, keys, scalars, parameters and batches.

Annotations give shapes in jaxtyping's notation, `Float[Array, "B H W C"]`: an axis has one size throughout a call, "#B"
also admits size 1, "*dims" stands for any number of axes, "_" for any size and "..." for any shape. The tests check
every call in `diffusion`, `models` and `stages` against its annotations; outside of the tests nothing is checked.

The module is not called `types`, which would hide Python's own from a script run inside this folder.
"""

from collections.abc import Mapping
from typing import Any

import chex
import jax
import numpy as np
from jaxtyping import Float

Array = jax.Array | np.ndarray  # on a device or traced, or on the host
Key = chex.PRNGKey  # of `jax.random.key`
Scalar = chex.Scalar | Float[Array, ""]  # a setting that may be traced
Tree = chex.ArrayTree  # any pytree of arrays

Params = dict[str, Any]  # nested dicts of float32 arrays, by the names of modules
Batch = Mapping[str, Array]  # one entry per input, rows first
