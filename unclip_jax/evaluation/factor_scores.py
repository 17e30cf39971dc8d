"""Alignment, binding, precision and diversity of pictures of varied emoji scenes: counts of exactly read factors.

Each number comes with the n that it was counted over and a 95% interval: Wilson's for shares, a normal one for entropy.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from unclip_jax.data import varied_scenes
from unclip_jax.data.varied_scenes import ROTATIONS, Scene
from unclip_jax.evaluation.factors import Reading, as_read, rotation_as_read

_Z = 1.96  # normal quantile of a 95% interval


@dataclasses.dataclass(frozen=True)
class Measured:
    """A value of n observations with its 95% interval; NaN where n is 0."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}], n = {self.n}"


def share(hits: Sequence[bool]) -> Measured:
    """Computes the share of True, with Wilson's 95% interval (Wilson 1927)."""
    n = len(hits)
    if n == 0:
        return Measured(float("nan"), float("nan"), float("nan"), 0)
    p, z2 = float(np.mean(hits)), _Z**2
    middle, half = p + z2 / (2 * n), _Z * (p * (1 - p) / n + z2 / (4 * n**2)) ** 0.5
    return Measured(p, max(0.0, (middle - half) / (1 + z2 / n)), min(1.0, (middle + half) / (1 + z2 / n)), n)


def evenness(counts: np.ndarray) -> Measured:
    """Computes the entropy of a distribution over K values, of which counts (K,) were drawn, as a share of log K.

    With Miller and Madow's correction for few draws. 95% interval: normal, by the variance to second order in 1/n.
    """
    n, k = int(counts.sum()), len(counts)
    if n == 0:
        return Measured(float("nan"), float("nan"), float("nan"), 0)
    p = counts[counts > 0] / n
    entropy = -(p * np.log(p)).sum()
    variance = (p * np.square(np.log(p) + entropy)).sum() / n + (len(p) - 1) / (2 * n**2)
    corrected, half = entropy + (len(p) - 1) / (2 * n), _Z * variance**0.5
    value, low, high = np.clip(np.array([corrected, corrected - half, corrected + half]) / np.log(k), 0, 1)
    return Measured(float(value), float(low), float(high), n)


def chance() -> dict[str, float]:
    """Gives the alignment of pictures of scenes that were not asked for, by factor."""
    return {factor: 1 / len(values) for factor, values in varied_scenes.factors().items()}


def alignment(reading: Reading, asked: Sequence[Scene], named: Sequence[tuple[str, ...]]) -> dict[str, Measured]:
    """Shares of pictures that show what their captions name.

    asked, named: a scene and the factors named besides the object for each picture, as `varied_scenes.scenes` gives.
    Returns one share per factor, over the pictures whose caption names it; "named", over all named factors (n counts
    them); "all", over the pictures: the object and all that is named. What a caption leaves open is not compared.
    """
    named = [("object", *names) for names in named]
    pairs = list(zip(reading.scenes, map(as_read, asked), named, strict=True))
    right = [{name: getattr(seen, name) == getattr(scene, name) for name in names} for seen, scene, names in pairs]
    results = {factor: share([r[factor] for r in right if factor in r]) for factor in varied_scenes.factors()}
    results["named"] = share([hit for r in right for hit in r.values()])
    results["all"] = share([all(r.values()) for r in right])
    return results


def binding(reading: Reading, asked: Sequence[Scene], named: Sequence[tuple[str, ...]]) -> Measured:
    """Computes how often two named colours are each where they belong, of the pictures that show both.

    Counted are pictures whose caption names a tint and another colour for the background, and which show these two,
    the right way round or exchanged. Colours assigned at random would give 1/2.
    """
    hits = []
    for seen, scene, names in zip(reading.scenes, asked, named, strict=True):
        named_apart = {"tint", "colour"} <= set(names) and scene.tint != scene.colour
        if named_apart and (seen.tint, seen.colour) in ((scene.tint, scene.colour), (scene.colour, scene.tint)):
            hits.append(seen.tint == scene.tint)
    return share(hits)


def precision(reading: Reading) -> Measured:
    """Computes the share of pictures that can be read, as one possible scene; see `factors.UNEXPLAINED`."""
    return share(reading.readable)


def diversity(reading: Reading, named: Sequence[tuple[str, ...]]) -> dict[str, Measured]:
    """Computes for each factor how evenly its values are drawn where the caption leaves it open.

    1 where all values are drawn alike, nearly as in the data; 0 where it is always the same one. Counted are the
    readable pictures and, for rotation, those of objects whose four rotations differ.
    """
    results = {}
    for factor in data_variety():
        open_ = [s for s, names in _readable(reading, named) if factor not in names and _tells(s.object, factor)]
        drawn = [getattr(scene, factor) for scene in open_]
        results[factor] = evenness(np.array([drawn.count(value) for value in varied_scenes.factors()[factor]]))
    return results


def variety(reading: Reading, captions: Sequence[str], named: Sequence[tuple[str, ...]]) -> dict[str, Measured]:
    """Computes for each factor how often two pictures of one caption that leaves it open differ in it.

    Readable pictures with the same caption are taken two by two, each once, so that n counts independent twos.
    `data_variety` says how often the data's own differ.
    """
    results = {}
    for factor in data_variety():
        waiting, differ = {}, []
        for seen, (text, names) in _readable(reading, list(zip(captions, named, strict=True))):
            if factor in names or not _tells(seen.object, factor):
                continue
            if text in waiting:
                differ.append(getattr(waiting.pop(text), factor) != getattr(seen, factor))
            else:
                waiting[text] = seen
        results[factor] = share(differ)
    return results


def data_variety() -> dict[str, float]:
    """Gives the probability that two scenes of one object of the train split differ in a factor, by factor."""
    held_out = varied_scenes.HELD_OUT
    values = {factor: len(values) - (factor in held_out) for factor, values in varied_scenes.factors().items()}
    return {factor: 1 - 1 / k for factor, k in values.items() if factor != "object"}


def _readable(reading: Reading, others: Sequence) -> list[tuple]:
    rows = zip(reading.scenes, others, reading.readable, strict=True)
    return [(scene, other) for scene, other, readable in rows if readable]


def _tells(name: str, factor: str) -> bool:
    """False for the rotation of an object two of whose rotations look alike."""
    return factor != "rotation" or all(rotation_as_read(name, rotation) == rotation for rotation in ROTATIONS)
