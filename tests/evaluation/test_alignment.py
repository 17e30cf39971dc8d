"""Alignment without a network: true pictures are known, noise is not."""

import numpy as np
import pytest

from unclip_jax.data import emoji_scenes
from unclip_jax.data.emoji_scenes import render, scenes
from unclip_jax.evaluation import alignment
from unclip_jax.evaluation.intervals import wilson


def values(results):
    return {name: result.value for name, result in results.items()}


def drawn(kind, split, size, every=1):
    chosen = [scene for scene, _ in scenes(kind, split)][::every]
    return chosen, np.stack([render(scene, size) for scene in chosen])


@pytest.mark.parametrize("size", [16, 24, 64, 100, 256])
def test_true_pictures_score_1(size):
    chosen, images = drawn("single", "test", size)
    objects, colours = [s.object for s in chosen], [s.colour for s in chosen]
    assert alignment.classify(images) == (objects, colours)
    assert values(alignment.score(images, objects, colours)) == {"object": 1, "background": 1, "both": 1}


@pytest.mark.parametrize("size", [16, 64])
def test_pictures_moved_and_scaled_as_in_training_score_1(size):
    chosen, images = drawn("single", "train", size, every=11)
    score = values(alignment.score(images, [s.object for s in chosen], [s.colour for s in chosen]))
    assert score == {"object": 1, "background": 1, "both": 1}


def test_wrong_pictures_score_0_and_halves_count():
    chosen, images = drawn("single", "test", 64)
    objects, colours = [s.object for s in chosen], [s.colour for s in chosen]
    others = [next(o for o in emoji_scenes.objects() if o != name) for name in objects]
    assert values(alignment.score(images, others, colours)) == {"object": 0, "background": 1, "both": 0}
    half = [other if n < 32 else name for n, (other, name) in enumerate(zip(others, objects, strict=True))]
    elsewhere = [next(c for c in emoji_scenes.colours() if c != name) for name in colours]
    mixed = [other if 16 <= n < 32 else name for n, (other, name) in enumerate(zip(elsewhere, colours, strict=True))]
    score = alignment.score(images, half, mixed)
    assert values(score) == {"object": 0.5, "background": 0.75, "both": 0.5}
    assert score["object"].n == 64 and score["object"][2:4] == wilson(32, 64)


def test_noise_scores_chance():
    rng = np.random.default_rng(0)
    n = 1500
    images = rng.integers(0, 256, (n, 16, 16, 3), dtype=np.uint8)
    objects, colours = rng.choice(emoji_scenes.objects(), n), rng.choice(list(emoji_scenes.colours()), n)
    score, chance = values(alignment.score(images, list(objects), list(colours))), alignment.chance()
    assert chance == {"object": 1 / 48, "background": 1 / 8, "both": 1 / 384}
    for name, p in chance.items():
        assert abs(score[name] - p) < 4 * np.sqrt(p * (1 - p) / n), name


def test_survives_blur_and_noise():
    chosen, images = drawn("single", "test", 64)
    spoiled = images.reshape(64, 16, 4, 16, 4, 3).mean(axis=(2, 4)).repeat(4, axis=1).repeat(4, axis=2)
    spoiled = np.clip(spoiled + np.random.default_rng(0).normal(0, 25, spoiled.shape), 0, 255).astype(np.uint8)
    assert alignment.score(spoiled, [s.object for s in chosen], [s.colour for s in chosen])["both"].value == 1


@pytest.mark.parametrize("split", ["train", "test"])
def test_pairs(split):
    chosen, images = drawn("pair", split, 64, every=50 if split == "train" else 5)
    objects, relations, others = ([getattr(s, name) for s in chosen] for name in ("object", "relation", "other"))
    assert values(alignment.score_pairs(images, objects, relations, others)) == {"object": 1, "other": 1, "both": 1}
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    swapped = [opposite[relation] for relation in relations]
    assert values(alignment.score_pairs(images, objects, swapped, others)) == {"object": 0, "other": 0, "both": 0}
    assert values(alignment.score_pairs(images, others, swapped, objects)) == {"object": 1, "other": 1, "both": 1}
