"""Scores of pictures of varied scenes: how like their scenes they are."""

import numpy as np

from unclip_jax.data import varied_scenes
from unclip_jax.data.transforms import area_resize
from unclip_jax.evaluation import factor_scores


def test_likeness_is_one_less_the_distance():
    """A picture that is off by 51 of 255 everywhere is 0.4 away in [-1, 1]."""
    scenes = [varied_scenes.scene_at("test", index)[0] for index in range(2)]
    true = np.stack([area_resize(varied_scenes.render(scene, 64), 32) for scene in scenes])
    off = np.where(true > 127, true - 51, true + 51).astype(np.uint8)
    images = np.stack([true[0], off[0], off[1], true[1]])
    np.testing.assert_allclose(factor_scores.likeness(images, scenes), [1, 0.6, 0.6, 1], atol=1e-9)
