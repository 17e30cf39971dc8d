"""Measures pictures of varied emoji scenes by the factors read from them: alignment, binding, precision, diversity.

All are exact counts, with their n and a 95 % interval: Wilson's for shares, a normal one for entropy.
"""

from collections.abc import Sequence

import numpy as np

from unclip_jax.data import varied_scenes
from unclip_jax.data.transforms import area_resize
from unclip_jax.data.varied_scenes import ROTATIONS, Scene
from unclip_jax.evaluation.factors import Reading, as_read, rotation_as_read
from unclip_jax.evaluation.intervals import Result, Z, wilson

CARD = {"reader": "nearest varied scene at 64 pixels"}


def share(name: str, hits: Sequence[bool]) -> Result:
    """Computes the share of True with Wilson's interval; NaN for none at all."""
    n = len(hits)
    if n == 0:
        return Result(name, float("nan"), float("nan"), float("nan"), 0, CARD)
    return Result(name, float(np.mean(hits)), *wilson(int(np.sum(hits)), n), n, CARD)


def evenness(name: str, counts: np.ndarray) -> Result:
    """Computes the entropy of the distribution that counts (K,) were drawn from, as a fraction of log K.

    Miller and Madow's correction for few draws is added. The interval is normal, with the variance to second order in
    1/n, because its first order is 0 where all values are drawn alike. NaN for no draws at all.
    """
    n, k = int(counts.sum()), len(counts)
    if n == 0:
        return Result(name, float("nan"), float("nan"), float("nan"), 0, CARD)
    p = counts[counts > 0] / n
    entropy = -(p * np.log(p)).sum()
    half = Z * np.sqrt((p * np.square(np.log(p) + entropy)).sum() / n + (len(p) - 1) / (2 * n**2))
    corrected = entropy + (len(p) - 1) / (2 * n)
    ends = np.clip(np.array([corrected, corrected - half, corrected + half]) / np.log(k), 0, 1)
    return Result(name, *map(float, ends), n, CARD)


def chance() -> dict[str, float]:
    """Computes the average `alignment` of pictures drawn without regard to their captions, by factor."""
    return {factor: 1 / len(values) for factor, values in varied_scenes.factors().items()}


def alignment(reading: Reading, asked: Sequence[Scene], named: Sequence[tuple[str, ...]]) -> dict[str, Result]:
    """Computes the shares of pictures that show what their captions name.

    asked, named: for each picture the scene asked for and the factors named besides the object, as
    `varied_scenes.scenes` yields them. What a caption leaves open is not compared.
    Returns a share for each factor, over the pictures whose caption names it; "named", over all factors that are named,
    which n counts; and "all", over the pictures, for those that show the object and all else that is named.
    """
    right = []
    for seen, scene, names in zip(reading.scenes, map(as_read, asked), named, strict=True):
        right.append({name: getattr(seen, name) == getattr(scene, name) for name in ("object", *names)})
    hits = {factor: [r[factor] for r in right if factor in r] for factor in varied_scenes.factors()}
    hits["named"] = [hit for r in right for hit in r.values()]
    hits["all"] = [all(r.values()) for r in right]
    return {key: share(f"alignment, {key}", values) for key, values in hits.items()}


def binding(reading: Reading, asked: Sequence[Scene], named: Sequence[tuple[str, ...]]) -> Result:
    """Computes how often two named colours are where they belong, of the pictures that show both.

    It counts the pictures whose caption names a tint and another colour for the background, and which show these two
    colours, the right way round or exchanged. Colours assigned at random would give 1/2.
    """
    hits = []
    for seen, scene, names in zip(reading.scenes, asked, named, strict=True):
        named_apart = {"tint", "colour"} <= set(names) and scene.tint != scene.colour
        if named_apart and (seen.tint, seen.colour) in ((scene.tint, scene.colour), (scene.colour, scene.tint)):
            hits.append(seen.tint == scene.tint)
    return share("binding", hits)


def precision(reading: Reading) -> Result:
    """Computes the share of pictures that can be read as one possible scene, by `factors.UNEXPLAINED`."""
    return share("precision", reading.readable)


def diversity(reading: Reading, named: Sequence[tuple[str, ...]]) -> dict[str, Result]:
    """Computes how evenly the values of each factor are drawn where the caption leaves it open: `evenness`.

    1 where all values are drawn alike, as nearly in the data; 0 where it is always the same one. It counts the pictures
    that show the factor readably (`Reading.shows`). For rotation, it counts only objects whose four rotations differ.
    """
    results = {}
    for factor in data_variety():
        drawn = [getattr(seen, factor) for seen, names in _shown(reading, named, factor) if factor not in names]
        counts = np.array([drawn.count(value) for value in varied_scenes.factors()[factor]])
        results[factor] = evenness(f"diversity, {factor}", counts)
    return results


def variety(reading: Reading, captions: Sequence[str], named: Sequence[tuple[str, ...]]) -> dict[str, Result]:
    """Computes how often two pictures for one caption differ in each factor that it leaves open.

    Pictures that have the same caption and show the factor readably (`Reading.shows`) are compared two by two, each
    only once, so that n counts independent twos. `data_variety` is the share for the data.
    """
    results = {}
    for factor in data_variety():
        waiting, differ = {}, []
        for seen, (text, names) in _shown(reading, list(zip(captions, named, strict=True)), factor):
            if factor in names:
                continue
            if text in waiting:
                differ.append(getattr(waiting.pop(text), factor) != getattr(seen, factor))
            else:
                waiting[text] = seen
        results[factor] = share(f"variety, {factor}", differ)
    return results


def likeness(images: np.ndarray, scenes: Sequence[varied_scenes.Scene]) -> np.ndarray:
    """Computes 1 less the root mean squared difference, on a scale of [-1, 1], of pictures from their scenes: (N,).

    images: uint8 (N, R, R, 3), N a multiple of the scenes: the pictures of each scene stand one after another. The
    scenes' own pictures are of 64 pixels, averaged down to R.
    """
    drawn = (varied_scenes.render(scene, varied_scenes.FRAME) for scene in scenes)
    true = np.stack([area_resize(picture, images.shape[1]) for picture in drawn]).astype(np.float64)
    error = (images - np.repeat(true, len(images) // len(true), axis=0)) / 127.5
    return 1 - np.sqrt(np.mean(np.square(error), axis=(1, 2, 3)))


def data_variety() -> dict[str, float]:
    """Computes for each factor the probability that two scenes of one object in the train split differ in it."""
    held_out = varied_scenes.HELD_OUT
    values = {factor: len(values) - (factor in held_out) for factor, values in varied_scenes.factors().items()}
    return {factor: 1 - 1 / k for factor, k in values.items() if factor != "object"}


def _shown(reading: Reading, others: Sequence, factor: str) -> list[tuple]:
    """Pairs the scenes of pictures that show a factor readably with what goes with them."""
    rows = zip(reading.scenes, others, reading.shows(factor), strict=True)
    return [(scene, other) for scene, other, shows in rows if shows and tells(scene.object, factor)]


def tells(name: str, factor: str) -> bool:
    """False for the rotation of an object two of whose rotations look alike."""
    return factor != "rotation" or all(rotation_as_read(name, rotation) == rotation for rotation in ROTATIONS)
