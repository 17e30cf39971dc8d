"""Measures pictures of emoji scenes, of any kind, by their captions alone."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from unclip_jax.data import emoji_scenes, varied_scenes
from unclip_jax.errors import UserError
from unclip_jax.evaluation import alignment, factor_scores, factors
from unclip_jax.evaluation.intervals import Result


def score(images: np.ndarray, captions: Sequence[str]) -> list[Result]:
    """Computes how often pictures show what their captions say, and of varied scenes binding, precision and diversity.

    images: uint8 RGB (N, S, S, 3). captions: N, as `read_captions` takes them.
    """
    kind, scenes = read_captions(captions)
    if kind == "single":
        return list(alignment.score(images, [s.object for s in scenes], [s.colour for s in scenes]).values())
    if kind == "pair":
        parts = ([getattr(s, name) for s in scenes] for name in ("object", "relation", "other"))
        return list(alignment.score_pairs(images, *parts).values())
    asked, named = zip(*scenes, strict=True)
    reading = factors.read(images)
    found = list(factor_scores.alignment(reading, asked, named).values())
    found += [factor_scores.binding(reading, asked, named), factor_scores.precision(reading)]
    found += factor_scores.diversity(reading, named).values()
    return found + list(factor_scores.variety(reading, captions, named).values())


def read_captions(captions: Sequence[str]) -> tuple[str, list[Any]]:
    """Finds the kind of emoji scenes, "single", "pair" or "varied", that captions describe, and their scenes: of varied
    ones with the factors that are named. Raises UserError where they are not all of one kind."""
    for kind, known in _captions().items():
        if all(text in known for text in captions):
            return kind, [known[text] for text in captions]
    read = [varied_scenes.read_caption(text) for text in captions]
    if None in read:
        wrong = captions[read.index(None)]
        raise UserError(f"{wrong!r} is no caption of emoji scenes: alignment is measured on these alone")
    return "varied", read


@functools.cache
def _captions() -> dict[str, dict[str, emoji_scenes.Scene]]:
    """Scenes by all their captions, by kind."""
    splits = ("train", "test")
    return {
        kind: {text: scene for split in splits for scene, text in emoji_scenes.scenes(kind, split)}
        for kind in ("single", "pair")
    }
