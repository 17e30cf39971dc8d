"""Steps of `data build` that a CLIP decides: similarity to the captions, a linear probe's rating, filters."""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from unclip_jax.bundle import load_description
from unclip_jax.data import filtering
from unclip_jax.data.cleaning import Candidate
from unclip_jax.errors import UserError
from unclip_jax.evaluation import features
from unclip_jax.evaluation.probes import Probe
from unclip_jax.paths import to_path


@dataclass(frozen=True)
class ClipSteps:
    """A `Scorer`, which workers are sent by name: each loads the CLIP once.

    clip: bundle. min_similarity: least cosine of picture and caption; captions below are left out. probe, min_rating:
    file of a `Probe`, and the least that it may give a picture. filters: files of a `Filter` each, which leave out the
    pictures that they find. None or () for no such step.
    """

    clip: str
    min_similarity: float | None = None
    probe: str | None = None
    min_rating: float | None = None
    filters: tuple[str, ...] = ()

    def check(self) -> dict[str, Any]:
        """Says what the steps are made of, as their identities. Raises UserError where they do not belong together."""
        description = load_description(to_path(self.clip))
        image = description["config"]["model"].get("image") or {"timesteps": True}
        if description["stage"] != "clip" or image.get("timesteps"):
            raise UserError(f"--clip {self.clip} is no CLIP that embeds pictures: expected one without noise")
        identity = description["identity"]
        steps = [*map(filtering.Filter.load, self.filters), *([Probe.load(self.probe)] if self.probe else [])]
        for path, step in zip([*self.filters, self.probe], steps, strict=False):
            if (weights := step.card.get("weights")) != identity:
                raise UserError(f"{path} is of CLIP {weights}, --clip {self.clip} is {identity}: use its")
        return {"clip": identity, "steps": [_numbers(step) for step in steps]}

    def load(self) -> None:
        """Loads the networks, before threads ask for views."""
        _loaded(self)

    def views(self, picture: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Cuts the square in the middle of a picture, and the three of filters: uint8 (n, R, R, 3), as the CLIP takes
        them."""
        prepare = _loaded(self).clip.pictures.prepare
        return prepare(picture[None]), prepare(filtering.crops(picture)) if self.filters else None

    def apply(self, candidates: list[Candidate]) -> None:
        """Drops those candidates, with their views, that a step does not keep."""
        loaded = _loaded(self)
        network, captions = loaded.clip
        if self.min_similarity is not None or loaded.probe:
            pictures = network(np.concatenate([candidate.views[0] for candidate in candidates]))["image"]
        if self.min_similarity is not None:
            texts = [candidate.captions[k] for candidate in candidates for k in candidate.chosen]
            rows = np.repeat(pictures, [len(candidate.chosen) for candidate in candidates], axis=0)
            cosines = iter(np.sum(rows * captions(texts), axis=1).tolist())
            for candidate in candidates:
                candidate.choose("min-similarity", lambda _: next(cosines) >= self.min_similarity)
        if loaded.probe:
            _drop(candidates, "min-rating", ~(loaded.probe(pictures, network.card) >= self.min_rating))
        if self.filters:
            rows = filtering.pooled(network(np.concatenate([candidate.views[1] for candidate in candidates]))["image"])
            found = [found.scores(rows, network.card) >= 0 for found in loaded.filters]
            _drop(candidates, "filter", np.any(found, axis=0))
        for candidate in candidates:
            candidate.views = None


class _Loaded(NamedTuple):
    clip: features.Clip
    probe: Probe | None
    filters: list[filtering.Filter]


@functools.cache
def _loaded(steps: ClipSteps) -> _Loaded:
    """Loads the networks once in each process."""
    probe = Probe.load(steps.probe) if steps.probe else None
    return _Loaded(features.clip(steps.clip), probe, [filtering.Filter.load(path) for path in steps.filters])


def _drop(candidates: Sequence[Candidate], step: str, which: np.ndarray) -> None:
    for candidate, dropped in zip(candidates, which, strict=True):
        if dropped and not candidate.dropped:
            candidate.dropped = step


def _numbers(step: Any) -> str:
    """Digest of a probe or filter, by which another one in the same file is noticed."""
    parts = (np.asarray(part, np.float64).tobytes() for part in step if not isinstance(part, dict))
    return hashlib.sha256(b"".join(parts)).hexdigest()
