"""Zero-shot classification by a CLIP (arXiv 2103.00020, section 3.1), and the attack on it by a written word.

    classes = class_embeddings(clip.captions, names, templates)
    similarities = clip.pictures(pictures)["image"] @ classes.T
    accuracy(similarities, labels), accuracy(similarities, labels, k=5), class_accuracies(similarities, labels, names)

The typographic attack (arXiv 2204.06125, figure 6): pictures of one thing carry a paper with another's name on it,
which `overlay` writes.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from unclip_jax.errors import UserError
from unclip_jax.evaluation.features import unit
from unclip_jax.evaluation.intervals import Result, share
from unclip_jax.paths import to_path

ALIKE = 1e-6  # 1 - cosine of two classes that a CLIP cannot tell apart
PADDING = 0.35  # white around a written word, as a share of a line's height
INK, PAPER = (0, 0, 0), (255, 255, 255)


def read_templates(path: str | Path) -> list[str]:
    """Reads a file of templates, one a line, such as "a photo of a {}." Raises UserError where there is none, or one
    without {}."""
    try:
        templates = [line.strip() for line in to_path(path).read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"templates {path} cannot be read ({error}): expected a text file, one a line") from error
    if not templates:
        raise UserError(f"{path} has no templates: expected one a line, such as: a photo of a {{}}.")
    _check_templates(templates)
    return templates


def class_embeddings(
    captions: Callable[[list[str]], np.ndarray], names: Sequence[str], templates: Sequence[str] = ("{}",)
) -> np.ndarray:
    """Embeds classes, (classes, d), of unit norm: the mean of the unit embeddings of a class's captions, brought to
    unit norm again (section 3.1.4).

    captions: texts → their embeddings (n, d), of any length. templates: captions with {} for the name. Raises UserError
    for a template without {}, and for classes that the CLIP cannot tell apart.
    """
    _check_templates(templates)
    texts = [template.replace("{}", name) for template in templates for name in names]
    classes = unit(unit(captions(texts)).reshape(len(templates), len(names), -1).mean(axis=0))
    alike = np.argwhere(np.triu(classes @ classes.T, 1) > 1 - ALIKE)
    if len(alike):
        raise UserError(f"labels {names[alike[0][0]]!r} and {names[alike[0][1]]!r} are the same to this CLIP, "
                        "which may have cut them: give others")  # fmt: skip
    return classes


def accuracy(similarities: np.ndarray, labels: np.ndarray, k: int = 1) -> Result:
    """Share of pictures whose own class is among the k most similar, of similarities (n, classes) and the numbers of
    their classes (n,).

    A class as similar as a picture's own counts as more similar. Raises UserError for labels that are no classes,
    similarities that are not finite, and k that takes all classes.
    """
    ranks, classes = _ranks(similarities, labels), similarities.shape[1]
    if not 1 <= k < classes:
        raise UserError(f"top-{k} accuracy among {classes} classes: expected k from 1 to {classes - 1}")
    return share(f"top-{k} accuracy", ranks < k, "pictures", classes=classes, chance=k / classes)


def class_accuracies(similarities: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> dict[str, Result]:
    """Top-1 accuracy over the pictures of each class, by its name; classes without pictures are left out."""
    if len(names) != similarities.shape[1]:
        raise UserError(f"{len(names)} names of {similarities.shape[1]} classes: expected a name for each")
    hits = _ranks(similarities, labels) == 0
    own = {name: hits[np.asarray(labels) == k] for k, name in enumerate(names)}
    about = {"classes": len(names), "chance": 1 / len(names)}
    return {
        name: share(f"top-1 accuracy of {name}", found, "pictures", **about)
        for name, found in own.items()
        if len(found)
    }


def typographic_attack(
    before: np.ndarray, after: np.ndarray, labels: np.ndarray, written: np.ndarray
) -> dict[str, Result]:
    """Top-1 accuracy "before" and "after" words were written on pictures, and the share after that "follows" them.

    before, after: similarities (n, classes) of the pictures without and with the words. labels, written: numbers of the
    classes that they show, and that are written on them (n,). Raises UserError as `accuracy` does, and where a picture
    carries its own class's name.
    """
    if before.shape != after.shape or len(labels) != len(written):
        raise UserError(f"similarities {before.shape} and {after.shape}: expected the same pictures before and after")
    if own := int(np.sum(np.asarray(labels) == np.asarray(written))):
        raise UserError(f"{own} pictures carry the name of what they show: write another class's")
    found = accuracy(before, labels), accuracy(after, labels), accuracy(after, written)
    names = {"before": "accuracy before the attack", "after": "accuracy after it", "follows": "share that follows it"}
    return {key: result._replace(name=name) for (key, name), result in zip(names.items(), found, strict=True)}


def overlay(image: np.ndarray, text: str, place: tuple[float, float] = (0.5, 0.75), height: float = 0.2) -> np.ndarray:
    """Writes a word in black on a white paper onto a picture, uint8 RGB (H, W, 3), of which it gives a copy.

    place: middle of the paper (right, down); height: of the paper; fractions of the picture's sides. A paper that would
    be wider than the picture is made smaller, and one that would stick out is moved in. The font is the one inside
    Pillow. Raises UserError for an empty text, and where place or height is no such fraction.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not text.strip() or "\n" in text:
        raise UserError(f"text {text!r} to write on a picture: expected a word, in one line")
    if not (0 < height <= 1 and all(0 <= at <= 1 for at in place)):
        raise UserError(f"a paper {height} high at {place}: expected fractions of the picture's sides, from 0 to 1")
    rows, columns = image.shape[:2]

    def sizes(line):
        """Font for lines so high, and the paper's sides, in pixels."""
        font = ImageFont.load_default(line * 0.8)
        return font, (font.getlength(text) + 2 * PADDING * line, (1 + 2 * PADDING) * line)

    line = height * rows / (1 + 2 * PADDING)
    line *= min(1, columns / sizes(line)[1][0])
    font, sides = sizes(line)
    wide, high = (max(1, min(round(side), limit)) for side, limit in zip(sides, (columns, rows), strict=True))
    left, top = (
        min(max(0, round(at * limit - side / 2)), limit - side)
        for at, limit, side in zip(place, (columns, rows), (wide, high), strict=True)
    )
    paper = Image.new("RGB", (wide, high), PAPER)
    ImageDraw.Draw(paper).text((wide / 2, high / 2), text, INK, font, anchor="mm")
    attacked = image.copy()
    attacked[top : top + high, left : left + wide] = np.asarray(paper)
    return attacked


def _check_templates(templates: Sequence[str]) -> None:
    for template in templates:
        if "{}" not in template:
            raise UserError(f"template {template!r}: expected {{}} in it, where the label goes")


def _ranks(similarities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Counts the other classes that are at least as similar to each picture as its own: (n,)."""
    labels = np.asarray(labels)
    n, classes = similarities.shape
    if not n or labels.shape != (n,) or labels.min() < 0 or labels.max() >= classes:
        raise UserError(f"labels {labels.shape} of {n} pictures: expected numbers of {classes} classes, one for each")
    if not np.isfinite(similarities).all():
        raise UserError("similarities are not finite: do the embeddings have unit norm?")
    own = np.take_along_axis(similarities, labels[:, None], axis=1)
    return np.sum(similarities >= own, axis=1) - 1
