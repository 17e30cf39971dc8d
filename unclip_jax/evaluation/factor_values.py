"""Measures of single pictures of varied emoji scenes, by the factors read from them, for comparisons of arms."""

from collections.abc import Sequence

import numpy as np

from unclip_jax.data import varied_scenes
from unclip_jax.data.varied_scenes import Scene
from unclip_jax.evaluation.factor_scores import tells
from unclip_jax.evaluation.factors import Reading, as_read

MEASURES = ("named", "all", "both", "binding", "readable", "variety")  # besides the factors


def scene_values(
    reading: Reading, scenes: Sequence[Scene], named: Sequence[tuple[str, ...]]
) -> dict[str, np.ndarray]:
    """Computes values of each picture, (scenes, draws) each, NaN where a picture has none.

    "named", the share of the named factors that are right; "all", whether all are; "both", whether two named colours
    are; "binding", of pictures that show both, whether they are not exchanged; "readable"; "variety", of the
    open factors that two pictures show readably, the share in which they differ; and each factor's own.

    reading: of the pictures, those of each scene one after another. named: the factors besides the object that each
    scene's caption names.
    """
    draws = len(reading.scenes) // len(scenes)
    shows = {name: reading.shows(name).reshape(len(scenes), draws) for name in varied_scenes.factors()}
    found = {name: np.full((len(scenes), draws), np.nan) for name in (*MEASURES, *varied_scenes.factors())}
    for row, (scene, names) in enumerate(zip(map(as_read, scenes), named, strict=True)):
        seen = reading.scenes[row * draws : (row + 1) * draws]
        for k, shown in enumerate(seen):
            right = {name: getattr(shown, name) == getattr(scene, name) for name in ("object", *names)}
            for name, hit in right.items():
                found[name][row, k] = hit
            found["named"][row, k], found["all"][row, k] = np.mean(list(right.values())), all(right.values())
            colours = (shown.tint, shown.colour)
            if {"tint", "colour"} <= set(names) and scene.tint != scene.colour:
                found["both"][row, k] = colours == (scene.tint, scene.colour)
                if sorted(colours) == sorted((scene.tint, scene.colour)):
                    found["binding"][row, k] = colours[0] == scene.tint
            left = [name for name in varied_scenes.factors() if name != "object" and name not in names]
            others = [(j, other) for j, other in enumerate(seen) if j != k]
            pairs = [(other, name) for j, other in others for name in left if shows[name][row, [j, k]].all()
                     and all(tells(scene.object, name) for scene in (shown, other))]  # fmt: skip
            differ = [getattr(other, name) != getattr(shown, name) for other, name in pairs]
            found["variety"][row, k] = np.mean(differ) if differ else np.nan
    return found | {"readable": reading.readable.reshape(len(scenes), draws).astype(np.float64)}


def every_factor(scenes: Sequence[Scene]) -> list[tuple[str, ...]]:
    """Names all factors of each scene but the object, for `scene_values` of pictures that are to be as their scenes."""
    return [tuple(name for name in varied_scenes.factors() if name != "object")] * len(scenes)
