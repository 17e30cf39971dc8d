"""Metrics against the same by brute force."""

import jax
import jax.numpy as jnp
import numpy as np
from shrink import random_batch, small_config, small_stage

from unclip_jax.stages import make_stage
from unclip_jax.stages.upsampler import Upsampler

ROWS = 5


def unit(rows):
    rows = np.asarray(rows, np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
