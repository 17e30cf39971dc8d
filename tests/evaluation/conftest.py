"""Inception-v3 with random weights, in a folder as `pretrained inception` writes it."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from unclip_jax.bundle import save_bundle
from unclip_jax.evaluation.features import INCEPTION
from unclip_jax.models.inception import parameter_shapes


@pytest.fixture(scope="session")
def inception_folder(tmp_path_factory):
    rng = np.random.default_rng(0)

    def draw(leaf):
        spread = np.sqrt(2 / np.prod(leaf.shape[:-1])) if len(leaf.shape) > 1 else 0.1
        return (spread * rng.standard_normal(leaf.shape, np.float32)).astype(np.float32)

    folder = tmp_path_factory.mktemp("inception") / "inception"
    save_bundle(folder, INCEPTION, ConfigDict(), jax.tree.map(draw, parameter_shapes()), None, "", {})
    return folder
