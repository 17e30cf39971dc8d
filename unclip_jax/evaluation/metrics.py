"""Metrics of pictures by name: those of Inception's features, and those of a CLIP's."""

import types
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from unclip_jax.errors import UserError
from unclip_jax.evaluation import frechet
from unclip_jax.evaluation.inception_score import inception_score
from unclip_jax.evaluation.intervals import Result
from unclip_jax.evaluation.manifold import precision_recall

if TYPE_CHECKING:
    from unclip_jax.evaluation.features import Clip

INCEPTION = {"fid": "pool", "sfid": "spatial", "kid": "pool", "inception_score": "logits", "precision_recall": "pool"}
# metric → the features it needs
CLIP = ("cmmd", "clip_score", "r_precision", "diversity", "vendi_score", "zero_shot", "near_matches", "regurgitation")
CAPTIONED = ("clip_score", "r_precision", "diversity", "zero_shot", "regurgitation")  # of CLIP's, need captions
COMPARED = ("cmmd", "near_matches", "regurgitation")  # of CLIP's, need a reference


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


class Embedded(NamedTuple):
    """A CLIP's embeddings (N, d) of pictures, and their captions, "" where one has none."""

    pictures: np.ndarray
    captions: Sequence[str]


def by_clip(
    names: Iterable[str],
    network: "Clip",
    drawn: Embedded,
    reference: Embedded | None,
    templates: Sequence[str],
    threshold: float,
) -> list[Result]:
    """Computes the metrics `names`, of `CLIP`.

    reference: for those of `COMPARED`; of regurgitation, training pictures, each drawing's own being the first of the
    same caption. templates: of zero_shot, whose classes are the captions that occur. threshold: cosine from which two
    pictures are near. Raises UserError for a drawing whose caption no training picture has.
    """
    from unclip_jax.evaluation import clip_score, diversity, neighbours, zero_shot

    texts = network.captions(list(drawn.captions)) if {"clip_score", "r_precision"} & set(names) else None
    known, found = reference.pictures if reference else None, []
    for name in names:
        if name == "cmmd":
            found.append(frechet.cmmd(drawn.pictures, known))
        elif name in ("clip_score", "r_precision"):
            found.append(getattr(clip_score, name)(drawn.pictures, texts))
        elif name == "diversity":
            found.append(diversity.diversity(drawn.pictures, np.array(drawn.captions)))
        elif name == "vendi_score":
            found.append(diversity.vendi_score(drawn.pictures))
        elif name == "zero_shot":
            classes, labels = np.unique(drawn.captions, return_inverse=True)
            rows = zero_shot.class_embeddings(network.captions, classes.tolist(), templates)
            found.append(zero_shot.accuracy(drawn.pictures @ rows.T, labels).noting(templates=list(templates)))
        elif name == "near_matches":
            found.append(neighbours.near(neighbours.nearest(drawn.pictures, known)[0][:, 0], threshold))
        else:
            found += _regurgitation(drawn, reference, threshold)
    return found


def _regurgitation(drawn: Embedded, training: Embedded, threshold: float) -> list[Result]:
    from unclip_jax.evaluation import neighbours

    rows: dict[str, int] = {}
    for row, text in enumerate(training.captions):
        rows.setdefault(text, row)
    if missing := [text for text in drawn.captions if text not in rows]:
        raise UserError(f"no training picture has the caption {missing[0]!r}: regurgitation is of drawings of training "
                        "captions")  # fmt: skip
    own = np.array([rows[text] for text in drawn.captions])
    found = neighbours.regurgitation(drawn.pictures, training.pictures, threshold, own)
    nearest = [pair._asdict() for pair in found.pairs]
    return [result.noting(nearest_to_own=nearest) for result in found.results.values()]
