"""Metrics of pictures by their Inception features, by name."""

import types
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from unclip_jax.evaluation import frechet
from unclip_jax.evaluation.inception_score import inception_score
from unclip_jax.evaluation.intervals import Result
from unclip_jax.evaluation.manifold import precision_recall

INCEPTION = {"fid": "pool", "sfid": "spatial", "kid": "pool", "inception_score": "logits", "precision_recall": "pool"}
# metric → the features it needs


def by_inception(
    names: Iterable[str],
    drawn: Mapping[str, np.ndarray],
    true: Mapping[str, np.ndarray],
    card: dict[str, Any],
    references: Mapping[str, frechet.Statistics] = types.MappingProxyType({}),
) -> list[Result]:
    """Computes the metrics `names`, keys of `INCEPTION`, of drawn pictures.

    drawn, true: features (N, d) by kind, "pool", "spatial" or "logits". card: of the features and the pictures.
    references: statistics by kind for fid and sfid, instead of those of `true`.
    """
    found = []
    for name in names:
        kind = INCEPTION[name]
        about = card | {"features": kind}
        if name in ("fid", "sfid"):
            known = references.get(kind) or frechet.statistics([true[kind]], about)
            found.append(frechet.fid(frechet.grouped_statistics([drawn[kind]], frechet.GROUPS, about), known))
        elif name == "kid":
            found.append(frechet.kid(drawn[kind], true[kind]).noting(**about))
        elif name == "inception_score":
            found.append(inception_score(drawn[kind]).noting(**about))
        else:
            found += [result.noting(**about) for result in precision_recall(drawn[kind], true[kind]).values()]
    return found
